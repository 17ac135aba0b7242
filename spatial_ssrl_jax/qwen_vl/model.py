"""A Qwen-VL model: both towers, and the functions that run them on a batch of prompts.

Parameters are a pure nested dict of arrays; `bind` puts them into the modules. The layers of either
tower are stacked along a leading axis.
"""

from functools import cache

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.family import member_of
from spatial_ssrl_jax.qwen_vl.inputs import PackedRows, PromptBatch, VisionFeatures, VisionInput
from spatial_ssrl_jax.qwen_vl.layers import Init, Linear
from spatial_ssrl_jax.qwen_vl.lora import (
    NO_LORA,
    LoraSettings,
    adapt,
    adapter_settings,
    select_adapters,
)
from spatial_ssrl_jax.qwen_vl.param_tree import Params
from spatial_ssrl_jax.qwen_vl.rope import text_rotary
from spatial_ssrl_jax.qwen_vl.text import TextModel


class QwenVL(nnx.Module):  # noqa: N801 - the model's own name
    """The whole model's weights."""

    def __init__(self, config: QwenVLConfig, key: Array):
        tower = member_of(config).vision_tower
        self.vision = tower(Init(jax.random.fold_in(key, 0)), config.vision)
        tied = config.tie_word_embeddings
        self.text = TextModel(Init(jax.random.fold_in(key, 1)), config.text, tied)


@cache
def _abstract(config: QwenVLConfig, lora: LoraSettings) -> tuple[nnx.GraphDef, nnx.State]:
    def build() -> QwenVL:
        model = QwenVL(config, jax.random.key(0))
        adapt(model, lora, jax.random.key(0))
        return model

    return nnx.split(nnx.eval_shape(build))


def abstract_params(config: QwenVLConfig, lora: LoraSettings = NO_LORA) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`, float32; with `lora`, adapters too."""
    return nnx.to_pure_dict(_abstract(config, lora)[1])


def param_axes(config: QwenVLConfig, lora: LoraSettings = NO_LORA) -> Params:
    """The parameter tree with each weight's logical axes as its leaf."""
    _, state = _abstract(config, lora)
    axes = jax.tree.map(lambda p: p.axes, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.to_pure_dict(axes)


@cache
def contracted_axes(config: QwenVLConfig) -> dict[str, int]:
    """Of each linear layer's path, how many leading axes of its kernel belong to the input."""
    model = nnx.merge(*_abstract(config, NO_LORA))
    return {
        "/".join(map(str, path)): module.contract
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }


def init_params(config: QwenVLConfig, key: Array) -> Params:
    """Fresh weights, float32, drawn from `key`."""
    return nnx.to_pure_dict(nnx.state(QwenVL(config, key)))


def init_adapters(config: QwenVLConfig, lora: LoraSettings, key: Array) -> Params:
    """Fresh adapters alone, float32, drawn from `key`; the model computes the same with them."""
    model = nnx.merge(*_abstract(config, NO_LORA))  # shapes suffice: no base weight is drawn
    adapt(model, lora, jax.random.fold_in(key, 2))
    return select_adapters(nnx.to_pure_dict(nnx.state(model)))


def bind(config: QwenVLConfig, params: Params) -> QwenVL:
    """The modules with `params` in them, and with adapters where `params` has them."""
    return nnx.merge(_abstract(config, adapter_settings(params))[0], params)


def encode_vision(
    model: QwenVL, vision: VisionInput[Array], compute: Compute, merge: bool
) -> VisionFeatures[Array]:
    """Runs the vision tower on images, and with `merge` its merger."""
    tokens = model.vision.encode(vision, compute)
    tokens = model.vision.merge(tokens, compute) if merge else tokens
    return VisionFeatures(tokens, merge)


def embed_prompt(
    model: QwenVL, prompts: PromptBatch[Array] | PackedRows[Array], compute: Compute
) -> Array:
    """[B, T, D] token embeddings, those of images from the vision tower."""
    x = compute.constrain(model.text.embed[...][prompts.ids].astype(compute.dtype))
    vision = prompts.vision
    if vision.length == 0:
        return x
    if isinstance(vision, VisionInput):
        vision = encode_vision(model, vision, compute, merge=True)
    merged = vision.tokens if vision.merged else model.vision.merge(vision.tokens, compute)
    index = jnp.maximum(prompts.image_index, 0)[..., None]
    image = jnp.take_along_axis(merged, index, axis=1)
    return jnp.where(prompts.image_index[..., None] >= 0, image, x)


def prefill(
    config: QwenVLConfig, model: QwenVL, prompts: PromptBatch[Array], compute: Compute
) -> tuple[Array, Array, Array]:
    """Encodes images and runs prompts once.

    Returns:
      Hidden state [B, D] of each prompt's last token, keys and values [L, B, K, T, H].
    """
    x = embed_prompt(model, prompts, compute)
    rotary = text_rotary(config.text, prompts.position)
    hidden, keys, values = model.text.prefill(
        x,
        rotary,
        prompts.valid,
        compute,
    )
    return _last(hidden, prompts), keys, values


def packed_hidden(
    config: QwenVLConfig, model: QwenVL, rows: PackedRows[Array], compute: Compute
) -> Array:
    """Hidden states [B, R, D] from which the response tokens of packed rows are predicted."""
    hidden = model.text.packed(
        embed_prompt(model, rows, compute),
        text_rotary(config.text, rows.position),
        rows.segment,
        rows.response,
        compute,
        rows.limits,
    )
    return jnp.take_along_axis(hidden, jnp.maximum(rows.place, 0)[..., None], axis=1)


def _last(hidden_BTD: Array, prompts: PromptBatch[Array]) -> Array:
    """[B, D], of each prompt's last token."""
    return jnp.take_along_axis(hidden_BTD, (prompts.length - 1)[:, None, None], axis=1)[:, 0]
