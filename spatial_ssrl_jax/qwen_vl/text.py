"""The language model's layers, in the three modes that training and sampling need.

- `prefill`: prompts alone, keeping their keys and values;
- `packed`: rows of prompts with all their responses, for log-probabilities and gradients;
- `decode`: one token of each sample, over the shared prompt and the sample's own cache.

Shape letters: B prompts, G samples of a group, T prompt tokens, R response tokens, D width,
N query heads, K key/value heads, H head size, L layers.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from spatial_ssrl_jax.qwen_vl.attention import GroupLimits, Visible
from spatial_ssrl_jax.qwen_vl.compute import XLA, AttentionKernel, Compute
from spatial_ssrl_jax.qwen_vl.config import TextConfig
from spatial_ssrl_jax.qwen_vl.kernels import KeyValues, decode_attention, self_attention
from spatial_ssrl_jax.qwen_vl.layers import GatedMLP, Init, Linear, RMSNorm, scan_layers
from spatial_ssrl_jax.qwen_vl.lora import merge_adapters
from spatial_ssrl_jax.qwen_vl.param_tree import Params
from spatial_ssrl_jax.qwen_vl.rope import Rotary, rotate


class TextLayer(nnx.Module):
    """Grouped-query attention and gated MLP, each after an RMSNorm."""

    def __init__(self, init: Init, config: TextConfig):
        width, size = config.hidden_size, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.norm1 = RMSNorm(init, width, config.rms_norm_eps)
        self.norm2 = RMSNorm(init, width, config.rms_norm_eps)
        self.q = Linear(init, (width, heads, size), ("embed", "heads", "head_dim"), bias=True)
        self.k = Linear(init, (width, groups, size), ("embed", "kv_heads", "head_dim"), bias=True)
        self.v = Linear(init, (width, groups, size), ("embed", "kv_heads", "head_dim"), bias=True)
        out_axes = ("heads", "head_dim", "embed")
        self.o = Linear(init, (heads, size, width), out_axes, contract=2, ends_branch=True)
        self.mlp = GatedMLP(
            init, width, config.intermediate_size, bias=False, axes=("embed", "ffn")
        )

    def project(self, x: Array, rotary: Rotary) -> tuple[Array, Array, Array]:
        """Queries [..., T, N, H], keys and values [..., T, K, H], rotated."""
        x = self.norm1(x)
        return rotate(self.q(x), *rotary), rotate(self.k(x), *rotary), self.v(x)

    def grouped(self, x: Array) -> Array:
        """[..., K, N/K + 2, H]: the queries, the key and the value of each key/value head, before
        rotation."""
        x = self.norm1(x)
        k = self.k(x)
        return _group_heads(self.q(x), k, self.v(x), k.shape[-2])

    def finish(self, x: Array, mixed: Array) -> Array:
        """Adds attention's output, projected from `mixed` [..., T, N, H], then the MLP's."""
        x = x + self.o(mixed)
        return x + self.mlp(self.norm2(x))


class TextModel(nnx.Module):
    """Embedding, stacked layers, last norm and head."""

    def __init__(self, init: Init, config: TextConfig, tied: bool):
        shape, axes = (config.vocab_size, config.hidden_size), ("vocab", "embed")
        scale = config.hidden_size**-0.5
        self.embed = init.normal(shape, axes, scale)
        self.layers = TextLayer(init.stacked(config.num_hidden_layers), config)
        self.norm = RMSNorm(init, config.hidden_size, config.rms_norm_eps)
        self.head = None if tied else init.normal(shape, axes, scale)

    def head_weight(self, dtype: DTypeLike) -> Array:
        """[V, D] in `dtype`; the embedding itself when they are tied."""
        return (self.embed if self.head is None else self.head)[...].astype(dtype)

    def prefill(
        self,
        x_BTD: Array,
        rotary: Rotary,
        valid_BT: Array,
        compute: Compute,
    ) -> tuple[Array, Array, Array]:
        """Runs prompts.

        Args:
          x_BTD: embedded prompts, images included.
          rotary: angles of the prompt's positions, [B, T, H/2].
          valid_BT: bool, which tokens exist.
          compute: how to compute; `remat` has no effect, as there is no backward pass.

        Returns:
          Hidden states [B, T, D] after the last norm, keys and values [L, B, K, T, H].
        """
        visible = Visible.in_segments(jnp.where(valid_BT, 0, -1), causal=True)
        compute = replace(compute, remat="none")
        x, kept = self._causal(x_BTD, rotary, visible, compute, keep=True)
        assert kept is not None
        return x, *kept

    def packed(
        self,
        x_BTD: Array,
        rotary: Rotary,
        segment_BT: Array,
        response_BT: Array,
        compute: Compute,
        limits: GroupLimits,
    ) -> Array:
        """Runs rows of groups, each a prompt and all its responses.

        A prompt's token sees the prompt up to itself; a response's token sees the prompt and its
        response up to itself, never another response.

        Args:
          x_BTD: embedded rows, images included.
          rotary: angles of each token's position in its own sequence, [B, T, H/2].
          segment_BT: int32, which group a token belongs to; -1 is padding.
          response_BT: int32, which response from 1; 0 is the prompt and padding.
          compute: how to compute.
          limits: sizes of a group.

        Returns:
          Hidden states [B, T, D] after the last norm.
        """
        visible = Visible.in_groups(segment_BT, response_BT)
        return self._causal(x_BTD, rotary, visible, compute, keep=False, limits=limits)[0]

    def _causal(
        self,
        x: Array,
        rotary: Rotary,
        visible: Visible,
        compute: Compute,
        keep: bool,
        limits: GroupLimits | None = None,
    ) -> tuple[Array, KeyValues | None]:
        """The layers; with `keep`, of single prompts, keys and values too."""

        def step(layer: TextLayer, x: Array, _: None) -> tuple[Array, KeyValues | None]:
            x = compute.constrain(x)
            q, k, v = layer.project(x, rotary)
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            mixed = self_attention(q, k, v, visible, compute, causal=True, limits=limits)
            return layer.finish(x, mixed), (k, v) if keep else None

        x, kept = scan_layers(self.layers, step, x, None, remat=compute.remat)
        return self.norm(x), kept


class FusedProjectionLayer(nnx.Module):
    """A `TextLayer` for decode steps on a GPU: weights of the same activations are fused into one.

    A step's matmuls are so thin that one alone leaves a part of a GPU idle. A TPU gains nothing,
    and would keep a second copy of the fused weight in another order.
    """

    def __init__(self, init: Init, config: TextConfig):
        width, size, inner = config.hidden_size, config.head_dim, config.intermediate_size
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.norm1 = RMSNorm(init, width, config.rms_norm_eps)
        self.norm2 = RMSNorm(init, width, config.rms_norm_eps)
        # Of each key/value head: its query heads, its key, its value.
        shape, axes = (width, groups, heads // groups + 2, size), ("kv_heads", None, "head_dim")
        self.qkv = Linear(init, shape, ("embed", *axes), bias=True)
        out_axes = ("heads", "head_dim", "embed")
        self.o = Linear(init, (heads, size, width), out_axes, contract=2, ends_branch=True)
        self.gate_up = init.normal((width, 2, inner), ("embed", None, "ffn"), width**-0.5)
        self.down = Linear(init, (inner, width), ("ffn", "embed"), ends_branch=True)

    def grouped(self, x_BGD: Array) -> Array:
        """As `TextLayer.grouped`."""
        assert self.qkv.bias is not None
        kernel, bias = self.qkv.kernel[...], self.qkv.bias[...]
        flat = self.norm1(x_BGD).reshape(-1, kernel.shape[0])
        # As a vector the bias is added inside of the matmul.
        flat = jnp.matmul(flat, kernel.reshape(kernel.shape[0], -1)) + bias.reshape(-1)
        return flat.reshape(*x_BGD.shape[:-1], *bias.shape)

    def finish(self, x_BGD: Array, mixed_BGNH: Array) -> Array:
        """As `TextLayer.finish`."""
        x = x_BGD + self.o(mixed_BGNH)
        both = jnp.einsum("bgd,dcf->bgcf", self.norm2(x), self.gate_up[...])
        return x + self.down(jax.nn.silu(both[:, :, 0]) * both[:, :, 1])


def unstack(model: TextModel, dtype: str, fused: bool) -> list[Params]:
    """The stacked layers, adapters merged, as one pure dict of arrays a layer, in `dtype`.

    They are a `TextLayer`'s, or, `fused`, a `FusedProjectionLayer`'s.
    """
    weights = nnx.to_pure_dict(nnx.state(model.layers))
    count = jax.tree.leaves(weights)[0].shape[0]
    layers = (jax.tree.map(lambda x, i=i: x[i], weights) for i in range(count))
    # A layer at a time: merging whole stacks would need a float32 copy of each.
    merged = (merge_adapters(layer, dtype) for layer in layers)
    return [_fuse(layer) if fused else layer for layer in merged]


def _fuse(layer: Params) -> Params:
    mlp, groups = layer["mlp"], layer["k"]["bias"].shape[0]

    def grouped(name: str) -> Array:
        q, k, v = (layer[projection][name] for projection in ("q", "k", "v"))
        return _group_heads(q, k, v, groups)

    return {
        "norm1": layer["norm1"],
        "norm2": layer["norm2"],
        "qkv": {name: grouped(name) for name in ("kernel", "bias")},
        "o": layer["o"],
        "gate_up": jnp.stack([mlp[name]["kernel"] for name in ("gate", "up")], axis=1),
        "down": mlp["down"],
    }


def _group_heads(q: Array, k: Array, v: Array, groups: int) -> Array:
    """[..., N, H] and twice [..., K, H] -> [..., K, N/K + 2, H]."""
    q = q.reshape(*q.shape[:-2], groups, -1, q.shape[-1])
    return jnp.concatenate((q, k[..., None, :], v[..., None, :]), axis=-2)


def decode_layer(
    layer: TextLayer | FusedProjectionLayer,
    x_BGD: Array,
    rotary: Rotary,
    prefix: KeyValues,
    prefix_valid_BT: Array,
    own: KeyValues,
    cursor: Array,
    kernel: AttentionKernel = XLA,
) -> tuple[Array, KeyValues]:
    """One layer of one decode step: writes this token's key and value at `cursor`, then attends.

    Args:
      layer: the module with one layer's arrays.
      x_BGD: hidden state of each sample's newest token.
      rotary: angles of its position, [B, H/2].
      prefix: the prompt's keys and values, each [B, K, T, H].
      prefix_valid_BT: bool, which prompt tokens exist.
      own: the samples' keys and values, each [B, G, K, R, H].
      cursor: int32 slot that every sample writes; the token sees it and those before.
      kernel: of attention.

    Returns:
      The new hidden state [B, G, D] and the new `own`.
    """
    heads = layer.grouped(x_BGD)
    mixed, own = decode_attention(
        heads, rotary, prefix, prefix_valid_BT, own, cursor, kernel=kernel
    )
    return layer.finish(x_BGD, mixed), own
