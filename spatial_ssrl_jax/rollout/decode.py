"""The jitted programs of a rollout: copying the weights, prefill, decoding, growing the caches.

The decode loop is one `while_loop` on the device that looks for the end every few steps; every step
reads the prompt's keys and values once for the whole group.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl import model as qwen
from spatial_ssrl_jax.qwen_vl.compute import XLA, AttentionKernel, Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig, TextConfig
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch
from spatial_ssrl_jax.qwen_vl.layers import Init, cast
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.qwen_vl.rope import text_rotary
from spatial_ssrl_jax.qwen_vl.text import FusedProjectionLayer, TextLayer, decode_layer, unstack
from spatial_ssrl_jax.rollout.cache import (
    DecodeState,
    LayerCache,
    Prefix,
    constrained,
    extended,
    initial_state,
    prefix_shardings,
)
from spatial_ssrl_jax.rollout.sampling import Sampling, sample, uniforms


@dataclass(frozen=True)
class DecodeSettings:
    """What is fixed when the decode program is compiled.

    Attributes:
      sampling: temperature and truncation.
      stop_ids: tokens that end a response.
      suppressed: tokens that are never drawn.
      check_every: steps between looks at whether all have finished.
      layout: where caches are; None leaves it to the compiler.
      kernel: what computes attention; where, `layout` says, if there is one.
    """

    sampling: Sampling
    stop_ids: tuple[int, ...]
    suppressed: tuple[int, ...]
    check_every: int
    layout: Layout | None = None
    kernel: AttentionKernel = XLA


@partial(jax.jit, static_argnums=(0, 2, 3))
def decode_weights(
    config: QwenVLConfig, params: Params, dtype: str, joined: bool = False
) -> dict[str, Any]:
    """The decode step's own copy of the language model: one dict a layer, in `dtype`.

    Args:
      config: the model's shape.
      params: the model.
      dtype: of the copy.
      joined: as a `FusedProjectionLayer` has its weights.
    """
    text = qwen.bind(config, params).text
    return {
        "layers": unstack(text, dtype, joined),
        "embed": text.embed[...].astype(dtype),
        "head": None if text.head is None else text.head[...].astype(dtype),
        "norm": cast(nnx.to_pure_dict(nnx.state(text.norm)), dtype),
    }


@cache
def _layer(config: TextConfig, joined: bool) -> tuple[nnx.GraphDef, nnx.State]:
    kind = FusedProjectionLayer if joined else TextLayer
    return nnx.split(nnx.eval_shape(lambda: kind(Init(jax.random.key(0)), config)))


def _is_joined(layer: dict[str, Any]) -> bool:
    return "qkv" in layer


def decode_weight_shardings(
    config: QwenVLConfig, layout: Layout, joined: bool = False
) -> dict[str, Any]:
    """Where `decode_weights`' arrays are for sampling; `layers` is one layer's, for all are alike.

    Raises:
      UserError: an axis of a weight does not divide by its mesh axis.
    """
    whole = layout.param_shardings(config, part="text/")["text"]

    def place(path: Any, weight: nnx.Param) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        return layout.sharding(f"layers/{name}", weight.axes, weight.shape)

    layer = jax.tree.map_with_path(
        place, _layer(config.text, joined)[1], is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    around = {"embed": whole["embed"], "head": whole.get("head"), "norm": whole["norm"]}
    return around | {"layers": nnx.to_pure_dict(layer)}


@cache
def reshard_program(
    config: QwenVLConfig, layout: Layout, of_layer: bool, joined: bool = False
) -> jax.stages.Wrapped:
    """Jitted: one layer, or what is around the layers, to where sampling needs it.

    Donated where nothing moves; a part of another size could not take its buffer.
    """
    places = decode_weight_shardings(config, layout, joined)
    layer = places.pop("layers")

    def reshard(part: dict[str, Any]) -> dict[str, Any]:
        return part

    # Between two meshes only where results are asked to are holds; constraints inside may get lost.
    donated = 0 if layout.mesh.size == 1 else ()
    return jax.jit(reshard, out_shardings=layer if of_layer else places, donate_argnums=donated)


def reshard_weights(
    config: QwenVLConfig, layout: Layout, weights: dict[str, Any]
) -> dict[str, Any]:
    """The decode step's weights from where training has them to where sampling needs them.

    Already cast, so that half as much is sent, and a layer at a time: all at once, the compiler
    gathers many layers whole before it cuts the first. `weights` is used up.

    Args:
      config: the model's shape.
      layout: for sampling.
      weights: from `decode_weights`.
    """
    layers = weights.pop("layers")
    moved = reshard_program(config, layout, of_layer=False)(weights)
    move_layer = reshard_program(config, layout, True, _is_joined(layers[0]))
    weights.clear()
    for i in range(len(layers)):
        layers[i] = move_layer(layers[i])  # nothing else holds it: its memory is free after that
    return moved | {"layers": layers}


@cache
def prefill_program(
    config: QwenVLConfig, compute: Compute, layout: Layout | None = None
) -> jax.stages.Wrapped:
    """`prefill`, jitted, as a function of parameters and prompts."""

    def prefill(params: Params, prompts: PromptBatch) -> tuple[Array, Prefix]:
        model = qwen.bind(config, params)
        hidden, keys, values = qwen.prefill(config, model, prompts, compute)
        layers = tuple((keys[i], values[i]) for i in range(config.text.num_hidden_layers))
        return hidden, Prefix(layers, prompts.valid, prompts.next_position)

    if layout is None:
        return jax.jit(prefill)
    return jax.jit(
        prefill, out_shardings=(layout.batch_sharding(), prefix_shardings(config.text, layout))
    )


def prefill(
    config: QwenVLConfig,
    compute: Compute,
    params: Params,
    prompts: PromptBatch,
    layout: Layout | None = None,
) -> tuple[Array, Prefix]:
    """Encodes images and prompts once.

    Args:
      config: the model's shape.
      compute: how to compute.
      params: the model, laid out for training.
      prompts: B prompts, likewise.
      layout: for sampling, where the results go.

    Returns:
      [B, D] hidden state after each prompt, and the prompts' keys and values.
    """
    return prefill_program(config, compute, layout)(params, prompts)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def decode_chunk(
    config: QwenVLConfig,
    settings: DecodeSettings,
    steps: int,
    weights: dict[str, Any],
    prefix: Prefix,
    state: DecodeState,
    keys_BG: Array,
) -> DecodeState:
    """Writes up to `steps` more tokens of every sample; stops when all have finished.

    Args:
      config: the model's shape.
      settings: sampling and stopping.
      steps: a multiple of `settings.check_every`.
      weights: from `decode_weights`.
      prefix: the prompts.
      state: the samples so far; donated. Its caches must hold `steps` more slots.
      keys_BG: one key a sample.
    """
    end = state.cursor + steps
    keys_BG = constrained(keys_BG, settings.layout)

    def unfinished(state: DecodeState) -> Array:
        return (state.cursor < end) & ~state.finished.all()

    def some_steps(state: DecodeState) -> DecodeState:
        body = partial(_decode_step, config, settings, weights, prefix, keys_BG)
        return jax.lax.fori_loop(0, settings.check_every, lambda _, s: body(s), state)

    return constrained(jax.lax.while_loop(unfinished, some_steps, state), settings.layout)


def _decode_step(
    config: QwenVLConfig,
    settings: DecodeSettings,
    weights: dict[str, Any],
    prefix: Prefix,
    keys_BG: Array,
    state: DecodeState,
) -> DecodeState:
    state, token = _draw(settings, weights, keys_BG, state)
    x = weights["embed"][token]
    position = (prefix.next_position + state.cursor)[:, None, None]
    rotary = text_rotary(config.text, jnp.broadcast_to(position, (len(token), 3, 1)))
    rotary = tuple(angle[:, 0] for angle in rotary)
    kernel, layout = settings.kernel, settings.layout
    kernel = kernel if layout is None else replace(kernel, mesh=layout.mesh)
    caches = []
    for layer_weights, shared, own in zip(
        weights["layers"], prefix.layers, state.layers, strict=True
    ):
        layer = nnx.merge(_layer(config.text, _is_joined(layer_weights))[0], layer_weights)
        x, own = decode_layer(layer, x, rotary, shared, prefix.valid, own, state.cursor, kernel)
        caches.append(own)
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + config.text.rms_norm_eps)
    hidden = weights["norm"]["scale"] * x32.astype(x.dtype)
    return replace(state, layers=tuple(caches), hidden=hidden, cursor=state.cursor + 1)


def _draw(
    settings: DecodeSettings, weights: dict[str, Any], keys_BG: Array, state: DecodeState
) -> tuple[DecodeState, Array]:
    """Draws and writes down the next token of every sample that continues."""
    head = weights["embed"] if weights["head"] is None else weights["head"]
    logits = jnp.einsum("bgd,vd->bgv", state.hidden, head, preferred_element_type=jnp.float32)
    uniform = None if settings.sampling.temperature == 0 else uniforms(keys_BG, state.cursor)
    token, logprob = sample(logits, uniform, settings.sampling, settings.suppressed)
    token = jnp.where(state.finished, 0, token)
    logprob = jnp.where(state.finished, 0.0, logprob)

    def write(rows: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, new[..., None], state.cursor, axis=2)

    stopped = jnp.isin(token, jnp.array(settings.stop_ids, jnp.int32)) & ~state.finished
    state = replace(
        state,
        tokens=write(state.tokens, token),
        logprobs=write(state.logprobs, logprob),
        length=state.length + ~state.finished,
        finished=state.finished | stopped,
    )
    return state, token


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 5))
def initial_samples(
    config: TextConfig,
    group: int,
    slots: int,
    limit: int,
    hidden: Array,
    layout: Layout | None = None,
) -> DecodeState:
    """Every sample before its first token (see `cache.start`)."""
    return constrained(initial_state(config, hidden, group, slots, limit), layout)


@partial(jax.jit, static_argnums=(1, 2))
def grow_layer(cache: LayerCache, slots: int, layout: Layout | None = None) -> LayerCache:
    """One layer's cache with `slots` more slots after."""
    return constrained(extended(cache, slots), layout)


def grow(state: DecodeState, slots: int, layout: Layout | None = None) -> DecodeState:
    """The same samples with `slots` more cache slots after; `state` is used up.

    A layer at a time, so that old and new caches are not there together.
    """
    layers = []
    for old in state.layers:
        layers.append(grow_layer(old, slots, layout))
        for x in old:
            x.delete()
    return replace(state, layers=tuple(layers))
