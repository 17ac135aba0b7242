"""What decoding keeps between steps: the prompt's keys and values once a group, and each sample's.

One array a layer: a cache carried through a scan over layers would be copied at every step.
"""

from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.config import TextConfig

LayerCache = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """The prompts of a rollout, read by every sample and never written.

    Attributes:
      layers: keys and values [B, K, T, H] of each layer.
      valid: [B, T] bool, which prompt tokens exist.
      next_position: [B] int32 position of the first response token.
    """

    layers: tuple[LayerCache, ...]
    valid: Array
    next_position: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """B groups of G samples in the middle of being written.

    Attributes:
      layers: keys and values [B, G, K, C, H] of each layer, C slots so far.
      hidden: [B, G, D] hidden state that predicts the next token.
      tokens: [B, G, R] int32.
      logprobs: [B, G, R] float32 log-probability of each token.
      length: [B, G] int32 tokens written, the end token included.
      finished: [B, G] bool, an end token was written.
      cursor: int32 place of the next token, the same for all.
    """

    layers: tuple[LayerCache, ...]
    hidden: Array
    tokens: Array
    logprobs: Array
    length: Array
    finished: Array
    cursor: Array


def kv_token_bytes(config: TextConfig, dtype: str) -> int:
    """Bytes that one token's keys and values take in all layers."""
    values = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * values * jnp.dtype(dtype).itemsize


def initial_state(
    config: TextConfig, hidden_BD: Array, group: int, slots: int, limit: int
) -> DecodeState:
    """Every sample of every group before its first token, with `slots` cache slots."""
    batch = hidden_BD.shape[0]
    shape = (batch, group, config.num_key_value_heads, slots, config.head_dim)
    rows = (batch, group)
    return DecodeState(
        layers=tuple(
            (jnp.zeros(shape, hidden_BD.dtype), jnp.zeros(shape, hidden_BD.dtype))
            for _ in range(config.num_hidden_layers)
        ),
        hidden=jnp.broadcast_to(hidden_BD[:, None], (*rows, hidden_BD.shape[1])),
        tokens=jnp.zeros((*rows, limit), jnp.int32),
        logprobs=jnp.zeros((*rows, limit), jnp.float32),
        length=jnp.zeros(rows, jnp.int32),
        finished=jnp.zeros(rows, bool),
        cursor=jnp.zeros((), jnp.int32),
    )


def extended(cache: LayerCache, slots: int) -> LayerCache:
    """One layer's keys and values with `slots` more slots after."""
    return tuple(jnp.pad(x, [(0, 0)] * 3 + [(0, slots), (0, 0)]) for x in cache)


Kept = TypeVar("Kept")
_PREFIX = ("batch", "kv_heads", None, None)
_OWN = ("batch", None, "kv_heads", None, None)


def constrained(tree: Kept, layout: Layout | None) -> Kept:
    """What decoding keeps, held in a layout inside a jitted program; None leaves it as it is.

    Caches, the only arrays of four and five axes, are cut by rows and by key/value heads, all else
    by rows.
    """
    if layout is None:
        return tree

    def hold(x: Array) -> Array:
        axes = {4: _PREFIX, 5: _OWN}.get(x.ndim, ("batch", None, None)[: x.ndim])
        return jax.lax.with_sharding_constraint(x, layout.sharding("a cache", axes, x.shape))

    return jax.tree.map(hold, tree)


def prefix_shardings(config: TextConfig, layout: Layout) -> Prefix:
    """Where a `Prefix` is in a layout; `layers` stands for every cache."""
    shape = (layout.batch_shards, config.num_key_value_heads, 1, 1)
    return Prefix(
        layout.sharding("a cache", _PREFIX, shape), layout.batch_sharding(), layout.batch_sharding()
    )
