"""The state of decoding: the prompt's keys and values once a group, and those of each sample.

One array a layer: a cache carried through a scan over layers would be copied at every step.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.config import TextConfig
from spatial_ssrl_jax.qwen_vl.inputs import Leaf
from spatial_ssrl_jax.qwen_vl.kernels import KeyValues


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix(Generic[Leaf]):
    """The prompts of a rollout batch, read by every sample and never written.

    Attributes:
      layers: keys and values [B, K, T, H] of each layer.
      valid: [B, T] bool, which prompt tokens exist.
      next_position: [B] int32 position of the first response token.
    """

    layers: tuple[tuple[Leaf, Leaf], ...]
    valid: Leaf
    next_position: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState(Generic[Leaf]):
    """B groups of G samples that are being decoded.

    Attributes:
      layers: keys and values [B, G, K, C, H] of each layer, in C slots.
      hidden: [B, G, D] hidden state that predicts the next token.
      tokens: [B, G, R] int32, zero where none is written.
      logprobs: [B, G, R] float32 log-probability of each token.
      length: [B, G] int32 tokens written, the end token included.
      finished: [B, G] bool, an end token was written.
      cursor: [] int32 index of the next token, the same for all.
      stop_at: [B, G] int32 tokens after which a sample ends, for timings; else None.
    """

    layers: tuple[tuple[Leaf, Leaf], ...]
    hidden: Leaf
    tokens: Leaf
    logprobs: Leaf
    length: Leaf
    finished: Leaf
    cursor: Leaf
    stop_at: Leaf | None = None


def kv_token_bytes(config: TextConfig, dtype: str) -> int:
    """Bytes of one token's keys and values in all layers."""
    values = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * values * jnp.dtype(dtype).itemsize


def initial_state(
    config: TextConfig, hidden_BD: Array, group: int, slots: int, limit: int
) -> DecodeState[Array]:
    """The state before the first token.

    Args:
      config: the language model's shape.
      hidden_BD: hidden state after each prompt.
      group: G.
      slots: C, cache slots of each sample.
      limit: R, the most tokens of a response.
    """
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


def append_slots(cache: KeyValues, slots: int) -> KeyValues:
    """One layer's keys and values with `slots` more slots."""
    keys, values = (jnp.pad(x, [(0, 0)] * 3 + [(0, slots), (0, 0)]) for x in cache)
    return keys, values


Tree = TypeVar("Tree")
_PREFIX = ("batch", "kv_heads", None, None)
_OWN = ("batch", None, "kv_heads", None, None)


def constrain(tree: Tree, layout: Layout | None) -> Tree:
    """The state of decoding, constrained to a layout inside a jitted program; None leaves it as is.

    Caches, the only arrays of four and five axes, are sharded by rows and by key/value heads, all
    else by rows.
    """
    if layout is None:
        return tree

    def shard(x: Array) -> Array:
        axes = {4: _PREFIX, 5: _OWN}.get(x.ndim, ("batch", None, None)[: x.ndim])
        return jax.lax.with_sharding_constraint(x, layout.sharding("a cache", axes, x.shape))

    return jax.tree.map(shard, tree)


def prefix_shardings(config: TextConfig, layout: Layout) -> Prefix[NamedSharding]:
    """The sharding of each array of a `Prefix`."""
    shape = (layout.batch_shards, config.num_key_value_heads, 1, 1)
    cache = layout.sharding("a cache", _PREFIX, shape)
    layers = ((cache, cache),) * config.num_hidden_layers
    return Prefix(layers, layout.batch_sharding(), layout.batch_sharding())
