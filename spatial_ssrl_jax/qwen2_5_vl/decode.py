"""The language model's layer in a decode step: one token of each sample, over prompt and own cache.

Weights that read the same input lie side by side here: a product of few rows takes little longer
for twice the columns. Shape letters as in `text.py`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spatial_ssrl_jax.qwen2_5_vl.attention import attend_shared
from spatial_ssrl_jax.qwen2_5_vl.config import TextConfig
from spatial_ssrl_jax.qwen2_5_vl.layers import Axes, Init, Linear, RMSNorm
from spatial_ssrl_jax.qwen2_5_vl.lora import merge_adapters
from spatial_ssrl_jax.qwen2_5_vl.rope import rotate
from spatial_ssrl_jax.qwen2_5_vl.text import Rotary, TextModel


class DecodeLayer(nnx.Module):
    """A `TextLayer` whose keys and values, and whose gate and up, are one product each.

    The pair is an axis of its own in front of heads and columns, so that each half stays cut over
    devices as it was.
    """

    def __init__(self, init: Init, config: TextConfig):
        width, size, inner = config.hidden_size, config.head_dim, config.intermediate_size
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.norm1 = RMSNorm(init, width, config.rms_norm_eps)
        self.norm2 = RMSNorm(init, width, config.rms_norm_eps)
        self.q = Linear(init, (width, heads, size), ("embed", "heads", "head_dim"), bias=True)
        pair = ("embed", None, "kv_heads", "head_dim")
        self.kv = Linear(init, (width, 2, groups, size), pair, bias=True)
        self.o = Linear(init, (heads, size, width), ("heads", "head_dim", "embed"), contract=2)
        self.gate_up = Linear(init, (width, 2, inner), ("embed", None, "ffn"))
        self.down = Linear(init, (inner, width), ("ffn", "embed"))

    def __call__(
        self,
        x_BGD: Array,
        rotary: Rotary,
        prefix: tuple[Array, Array],
        prefix_valid_BT: Array,
        own: tuple[Array, Array],
        own_seen_BR: Array,
        cursor: Array,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Writes this token's key and value at `cursor`, then attends.

        Args:
          x_BGD: hidden state of each sample's newest token.
          rotary: angles of its position, [B, G, H/2].
          prefix: the prompt's keys and values, each [B, K, T, H].
          prefix_valid_BT: bool, which prompt tokens exist.
          own: the samples' keys and values, each [B, G, K, R, H].
          own_seen_BR: bool, which slots the token may see, its own included.
          cursor: int32 slot that every sample writes.

        Returns:
          The new hidden state [B, G, D] and the new `own`.
        """
        normed = self.norm1(x_BGD)
        q, kv = rotate(self.q(normed), *rotary), self.kv(normed)
        own = (
            _write(own[0], rotate(kv[:, :, 0], *rotary), cursor),
            _write(own[1], kv[:, :, 1], cursor),
        )
        seen = jnp.broadcast_to(own_seen_BR[:, None, None], (*q.shape[:2], 1, own_seen_BR.shape[1]))
        mixed = attend_shared(q[:, :, None], *prefix, prefix_valid_BT, *own, seen, chunk=1)
        x = x_BGD + self.o(mixed[:, :, 0])
        gate_up = self.gate_up(self.norm2(x))
        return x + self.down(jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]), own


def _write(cache_BGKRH: Array, new_BGKH: Array, cursor: Array) -> Array:
    new = new_BGKH[:, :, :, None].astype(cache_BGKRH.dtype)
    return jax.lax.dynamic_update_slice_in_dim(cache_BGKRH, new, cursor, axis=3)


def decode_weights(model: TextModel, dtype: str) -> list[dict]:
    """The stacked layers, adapters merged, as the arrays of one `DecodeLayer` each, in `dtype`."""
    weights = nnx.to_pure_dict(nnx.state(model.layers))
    count = jax.tree.leaves(weights)[0].shape[0]
    layers = (jax.tree.map(lambda x, i=i: x[i], weights) for i in range(count))
    # A layer at a time: merging whole stacks would need a float32 copy of each.
    return [_paired(merge_adapters(layer, dtype)) for layer in layers]


def _paired(layer: dict) -> dict:
    mlp = layer["mlp"]
    return {
        **{name: layer[name] for name in ("norm1", "norm2", "q", "o")},
        "kv": jax.tree.map(lambda k, v: jnp.stack((k, v), axis=-3), layer["k"], layer["v"]),
        "gate_up": {"kernel": jnp.stack((mlp["gate"]["kernel"], mlp["up"]["kernel"]), axis=1)},
        "down": mlp["down"],
    }


def bind_layer(config: TextConfig, weights: dict) -> DecodeLayer:
    """The module over one layer's arrays."""
    return nnx.merge(_abstract(config)[0], weights)


def map_layer(place: Callable[[str, Axes, tuple[int, ...]], Any], config: TextConfig) -> dict:
    """What `place` says of each of a layer's arrays: of its name, logical axes and shape."""

    def named(path: tuple, weight: nnx.Variable) -> Any:
        name = "/".join(str(key.key) for key in path)
        return place(name, weight.axes, weight.shape)

    is_weight = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    state = _abstract(config)[1]
    return nnx.to_pure_dict(jax.tree.map_with_path(named, state, is_leaf=is_weight))


@cache
def _abstract(config: TextConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: DecodeLayer(Init(jax.random.key(0)), config)))
