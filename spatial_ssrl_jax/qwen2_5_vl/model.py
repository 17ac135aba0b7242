"""Qwen2.5-VL: both towers, and the functions that run them on a batch of prompts.

Parameters travel as a pure nested dict of arrays; `bind` puts them into the modules. Vision and
layers are stacked along a leading layer axis.
"""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from spatial_ssrl_jax.qwen2_5_vl.config import Qwen2_5_VLConfig
from spatial_ssrl_jax.qwen2_5_vl.kernels import XLA, Kernel
from spatial_ssrl_jax.qwen2_5_vl.layers import Init
from spatial_ssrl_jax.qwen2_5_vl.lora import (
    NO_LORA,
    LoraSettings,
    adapt,
    found_adapters,
    only_adapters,
)
from spatial_ssrl_jax.qwen2_5_vl.rope import text_rotary
from spatial_ssrl_jax.qwen2_5_vl.text import TextModel
from spatial_ssrl_jax.qwen2_5_vl.tree import Params
from spatial_ssrl_jax.qwen2_5_vl.vision import VisionInput, VisionTower


@dataclass(frozen=True)
class Compute:
    """How programs run, apart from what they compute.

    Attributes:
      dtype: compute dtype, `float32` or `bfloat16`.
      chunk: queries that attend at a time.
      head_block: entries of the vocabulary whose logits exist at a time, for all tokens.
      remat: what the backward pass works out again of each layer: nothing (`none`), all but
        products with weights and fused attention (`dots`), or all (`full`).
      kernel: what computes self-attention over many tokens.
      step_kernel: what computes a decode step's.
      rows: where the rows of activations lie; None leaves it to the compiler, which on a mesh would
        rather cut their widths, as those of the weights are, and add up whole batches.
    """

    dtype: str = "float32"
    chunk: int = 1024
    head_block: int = 4096
    remat: str = "full"
    kernel: Kernel = XLA
    step_kernel: Kernel = XLA
    rows: NamedSharding | None = None

    def hold(self, x: Array) -> Array:
        """Activations with rows in front, kept where `rows` says, inside a jitted program."""
        return x if self.rows is None else jax.lax.with_sharding_constraint(x, self.rows)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptBatch:
    """B prompts padded to one bucket, pictures included.

    Attributes:
      ids: [B, T] int32 token ids, padded behind.
      length: [B] int32 tokens of each prompt.
      position: [B, 3, T] int32 M-RoPE positions.
      next_position: [B] int32 position of the first response token.
      image_index: [B, T] int32 merged vision token that stands at each place, -1 for text.
      vision: the pictures' windows.
    """

    ids: Array
    length: Array
    position: Array
    next_position: Array
    image_index: Array
    vision: VisionInput

    @property
    def valid(self) -> Array:
        """[B, T] bool, which tokens exist."""
        return jnp.arange(self.ids.shape[1]) < self.length[:, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedRows:
    """B rows of several examples each: prompt and response, one example behind another.

    Attributes:
      ids: [B, T] int32 token ids, padded behind.
      segment: [B, T] int32, which example of the row; -1 is padding.
      position: [B, 3, T] int32 M-RoPE positions, each example's as if it were alone.
      image_index: [B, T] int32 merged vision token of the row at each place, -1 for text.
      place: [B, R] int32, the place before each response token, which predicts it; -1 is padding.
      vision: the windows of all the row's pictures.
    """

    ids: Array
    segment: Array
    position: Array
    image_index: Array
    place: Array
    vision: VisionInput

    @property
    def labels(self) -> Array:
        """[B, R] int32, the response token that each place predicts."""
        return jnp.take_along_axis(self.ids, jnp.maximum(self.place, 0) + 1, axis=1)


class Qwen2_5_VL(nnx.Module):  # noqa: N801 - the model's own name
    """The whole model's weights."""

    def __init__(self, config: Qwen2_5_VLConfig, key: Array):
        self.vision = VisionTower(Init(jax.random.fold_in(key, 0)), config.vision)
        tied = config.tie_word_embeddings
        self.text = TextModel(Init(jax.random.fold_in(key, 1)), config.text, tied)


@cache
def _abstract(config: Qwen2_5_VLConfig, lora: LoraSettings) -> tuple[nnx.GraphDef, nnx.State]:
    def build() -> Qwen2_5_VL:
        model = Qwen2_5_VL(config, jax.random.key(0))
        adapt(model, lora, jax.random.key(0))
        return model

    return nnx.split(nnx.eval_shape(build))


def abstract_params(config: Qwen2_5_VLConfig, lora: LoraSettings = NO_LORA) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`, float32; with `lora`, adapters too."""
    return nnx.to_pure_dict(_abstract(config, lora)[1])


def param_axes(config: Qwen2_5_VLConfig, lora: LoraSettings = NO_LORA) -> Params:
    """The parameter tree with each weight's logical axes as its leaf."""
    _, state = _abstract(config, lora)
    axes = jax.tree.map(lambda p: p.axes, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(axes)


def init_params(config: Qwen2_5_VLConfig, key: Array) -> Params:
    """Fresh weights, float32, drawn from `key`."""
    return nnx.to_pure_dict(nnx.state(Qwen2_5_VL(config, key)))


def init_adapters(config: Qwen2_5_VLConfig, lora: LoraSettings, key: Array) -> Params:
    """Fresh adapters alone, float32, drawn from `key`; the model with them computes as without."""
    model = nnx.merge(*_abstract(config, NO_LORA))  # shapes are enough: no base weight is drawn
    adapt(model, lora, jax.random.fold_in(key, 2))
    return only_adapters(nnx.to_pure_dict(nnx.state(model)))


def bind(config: Qwen2_5_VLConfig, params: Params) -> Qwen2_5_VL:
    """The modules with `params` in them, and with adapters where `params` has them."""
    return nnx.merge(_abstract(config, found_adapters(params))[0], params)


def embed_prompt(model: Qwen2_5_VL, prompts: PromptBatch | PackedRows, compute: Compute) -> Array:
    """[B, T, D] token embeddings with the pictures' vectors in their places."""
    x = compute.hold(model.text.embed[...][prompts.ids].astype(compute.dtype))
    if prompts.vision.frame.shape[1] == 0:
        return x
    merged = model.vision(
        prompts.vision,
        dtype=compute.dtype,
        chunk=compute.chunk,
        remat=compute.remat,
        kernel=compute.kernel,
        hold=compute.hold,
    )
    index = jnp.maximum(prompts.image_index, 0)[..., None]
    picture = jnp.take_along_axis(merged, index, axis=1)
    return jnp.where(prompts.image_index[..., None] >= 0, picture, x)


def prefill(
    config: Qwen2_5_VLConfig, model: Qwen2_5_VL, prompts: PromptBatch, compute: Compute
) -> tuple[Array, Array, Array]:
    """Encodes pictures and runs prompts once.

    Returns:
      Hidden state [B, D] of each prompt's last token, keys and values [L, B, K, T, H].
    """
    x = embed_prompt(model, prompts, compute)
    rotary = text_rotary(config.text, prompts.position)
    hidden, keys, values = model.text.prefill(
        x,
        rotary,
        prompts.valid,
        chunk=compute.chunk,
        kernel=compute.kernel,
        hold=compute.hold,
    )
    return _last(hidden, prompts), keys, values


def response_hidden(
    config: Qwen2_5_VLConfig,
    model: Qwen2_5_VL,
    prompts: PromptBatch,
    tokens_BGR: Array,
    length_BG: Array,
    compute: Compute,
) -> Array:
    """Hidden states from which each response token is predicted.

    Args:
      config: the model's shape.
      model: the weights.
      prompts: B prompts, each run once for its whole group.
      tokens_BGR: int32 response tokens.
      length_BG: int32 tokens of each response.
      compute: dtype, chunks and rematerialisation.

    Returns:
      [B, G, R, D]: the first from the prompt's last token, the others from the token before.
    """
    response = tokens_BGR.shape[2]
    order = jnp.arange(response)
    position = prompts.next_position[:, None, None] + order
    position = jnp.broadcast_to(position[:, :, None], (*tokens_BGR.shape[:2], 3, response))
    prompt, own = model.text.group(
        embed_prompt(model, prompts, compute),
        compute.hold(model.text.embed[...][tokens_BGR].astype(compute.dtype)),
        text_rotary(config.text, prompts.position),
        text_rotary(config.text, position),
        prompts.valid,
        order < length_BG[..., None],
        chunk=compute.chunk,
        remat=compute.remat,
        kernel=compute.kernel,
        hold=compute.hold,
    )
    first = jnp.broadcast_to(
        _last(prompt, prompts)[:, None, None], (*own.shape[:2], 1, own.shape[3])
    )
    return jnp.concatenate((first, own[:, :, :-1]), axis=2)


def packed_hidden(
    config: Qwen2_5_VLConfig, model: Qwen2_5_VL, rows: PackedRows, compute: Compute
) -> Array:
    """Hidden states [B, R, D] from which the response tokens of packed rows are predicted."""
    hidden = model.text.packed(
        embed_prompt(model, rows, compute),
        text_rotary(config.text, rows.position),
        rows.segment,
        chunk=compute.chunk,
        remat=compute.remat,
        kernel=compute.kernel,
        hold=compute.hold,
    )
    return jnp.take_along_axis(hidden, jnp.maximum(rows.place, 0)[..., None], axis=1)


def _last(hidden_BTD: Array, prompts: PromptBatch) -> Array:
    return jnp.take_along_axis(hidden_BTD, (prompts.length - 1)[:, None, None], axis=1)[:, 0]
