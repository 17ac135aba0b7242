"""The jitted programs of a rollout: copying the weights, prefill, decoding, growing the caches.

The decode loop is one `while_loop` on the device that checks every few steps whether all samples
have finished; every step reads the prompt's keys and values once for the whole group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl import model as qwen
from spatial_ssrl_jax.qwen_vl.compute import XLA, AttentionKernel, Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig, TextConfig
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch
from spatial_ssrl_jax.qwen_vl.kernels import KeyValues
from spatial_ssrl_jax.qwen_vl.layers import Init, cast, rms_norm
from spatial_ssrl_jax.qwen_vl.param_tree import Params
from spatial_ssrl_jax.qwen_vl.rope import text_rotary
from spatial_ssrl_jax.qwen_vl.text import FusedProjectionLayer, TextLayer, decode_layer, unstack
from spatial_ssrl_jax.rollout.cache import (
    DecodeState,
    Prefix,
    Tree,
    append_slots,
    constrain,
    initial_state,
    prefix_shardings,
)
from spatial_ssrl_jax.rollout.sampling import Sampling, sample_group, uniforms
from spatial_ssrl_jax.rollout.schedule import Rows

# `layers`: a dict of arrays a layer; `embed`, `head` (None where tied) and `norm`.
DecodeWeights = dict[str, Any]
# Samples, their prompts, and one PRNG key a sample.
RowArrays = tuple[DecodeState[Array], Prefix[Array], Array]


@dataclass(frozen=True)
class DecodeSettings:
    """The static settings of the decode program.

    Attributes:
      sampling: temperature and truncation.
      stop_ids: tokens that end a response.
      suppressed: tokens that are never drawn.
      check_every: steps between checks of whether all have finished.
      layout: the sharding of caches; None leaves it to the compiler.
      kernel: of attention; a layout's mesh replaces its own.
    """

    sampling: Sampling
    stop_ids: tuple[int, ...]
    suppressed: tuple[int, ...]
    check_every: int
    layout: Layout | None = None
    kernel: AttentionKernel = XLA


@partial(jax.jit, static_argnums=(0, 2, 3))
def decode_weights(
    config: QwenVLConfig, params: Params, dtype: str, fused: bool = False
) -> DecodeWeights:
    """The decode step's own copy of the language model.

    Args:
      config: the model's shape.
      params: the model.
      dtype: of the copy.
      fused: in the layout of a `FusedProjectionLayer`; else of a `TextLayer`.
    """
    text = qwen.bind(config, params).text
    return {
        "layers": unstack(text, dtype, fused),
        "embed": text.embed[...].astype(dtype),
        "head": None if text.head is None else text.head[...].astype(dtype),
        "norm": cast(nnx.to_pure_dict(nnx.state(text.norm)), dtype),
    }


@cache
def _abstract_layer(config: TextConfig, fused: bool) -> tuple[nnx.GraphDef, nnx.State]:
    kind = FusedProjectionLayer if fused else TextLayer
    return nnx.split(nnx.eval_shape(lambda: kind(Init(jax.random.key(0)), config)))


def _is_fused(layer: Params) -> bool:
    return "qkv" in layer


def decode_weight_shardings(
    config: QwenVLConfig, layout: Layout, fused: bool = False
) -> dict[str, Any]:
    """The shardings of `decode_weights` for sampling; `layers` is that of one layer, of all alike.

    Raises:
      UserError: an axis of a weight does not divide by its mesh axis.
    """
    whole = layout.param_shardings(config, part="text/")["text"]

    def shard(path: tuple[Any, ...], weight: nnx.Param) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        return layout.sharding(f"layers/{name}", weight.axes, weight.shape)

    layer = jax.tree.map_with_path(
        shard, _abstract_layer(config.text, fused)[1], is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    rest = {"embed": whole["embed"], "head": whole.get("head"), "norm": whole["norm"]}
    return rest | {"layers": nnx.to_pure_dict(layer)}


@cache
def reshard_program(
    config: QwenVLConfig, layout: Layout, of_layer: bool, fused: bool = False
) -> jax.stages.Wrapped:
    """Jitted: reshards one layer, or all other weights, for sampling.

    Donates them on one device; on several a shard of another size cannot take over the buffer.
    """
    rest = decode_weight_shardings(config, layout, fused)
    layer = rest.pop("layers")

    def reshard(weights: Params) -> Params:
        return weights

    # Between two meshes only `out_shardings` is certain; constraints inside may get lost.
    donated = 0 if layout.mesh.size == 1 else ()
    return jax.jit(reshard, out_shardings=layer if of_layer else rest, donate_argnums=donated)


def reshard_weights(config: QwenVLConfig, layout: Layout, weights: DecodeWeights) -> DecodeWeights:
    """The decode step's weights, from the sharding of training to that of sampling.

    They are cast before, which halves what is sent, and resharded a layer at a time: of all at
    once, the compiler gathers many layers whole before it shards the first. `weights` is emptied.

    Args:
      config: the model's shape.
      layout: for sampling.
      weights: from `decode_weights`.
    """
    layers = weights.pop("layers")
    moved = reshard_program(config, layout, of_layer=False)(weights)
    move_layer = reshard_program(config, layout, True, _is_fused(layers[0]))
    weights.clear()
    for i in range(len(layers)):
        layers[i] = move_layer(layers[i])  # frees the old layer, which nothing else refers to
    return moved | {"layers": layers}


@cache
def prefill_program(
    config: QwenVLConfig, compute: Compute, layout: Layout | None = None
) -> jax.stages.Wrapped:
    """`prefill`, jitted, as a function of parameters and prompts."""

    def prefill(params: Params, prompts: PromptBatch[Array]) -> tuple[Array, Prefix[Array]]:
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
    prompts: PromptBatch[np.ndarray] | PromptBatch[Array],
    layout: Layout | None = None,
) -> tuple[Array, Prefix[Array]]:
    """Encodes images and prompts once.

    Args:
      config: the model's shape.
      compute: how to compute.
      params: the model, sharded for training.
      prompts: B prompts, on the host or sharded likewise.
      layout: for sampling, of the results.

    Returns:
      [B, D] hidden state after each prompt, and the prompts' keys and values.
    """
    return prefill_program(config, compute, layout)(params, prompts)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def decode_chunk(
    config: QwenVLConfig,
    settings: DecodeSettings,
    steps: int | Array,
    weights: DecodeWeights,
    prefix: Prefix[Array],
    state: DecodeState[Array],
    keys_BG: Array,
) -> DecodeState[Array]:
    """Writes up to `steps` more tokens of every sample; stops when all have finished.

    Args:
      config: the model's shape.
      settings: sampling and stopping.
      steps: a multiple of `settings.check_every`.
      weights: from `decode_weights`.
      prefix: the prompts.
      state: the samples so far; donated. Its caches must hold `steps` more slots.
      keys_BG: one PRNG key a sample.
    """
    end = state.cursor + steps
    keys_BG = constrain(keys_BG, settings.layout)

    def unfinished(state: DecodeState[Array]) -> Array:
        return (state.cursor < end) & ~state.finished.all()

    def some_steps(state: DecodeState[Array]) -> DecodeState[Array]:
        body = partial(_decode_step, config, settings, weights, prefix, keys_BG)
        return jax.lax.fori_loop(0, settings.check_every, lambda _, s: body(s), state)

    return constrain(jax.lax.while_loop(unfinished, some_steps, state), settings.layout)


def _decode_step(
    config: QwenVLConfig,
    settings: DecodeSettings,
    weights: DecodeWeights,
    prefix: Prefix[Array],
    keys_BG: Array,
    state: DecodeState[Array],
) -> DecodeState[Array]:
    """Draws a token of every sample, and runs it through the layers."""
    state, token = _draw(settings, weights, keys_BG, state)
    x = weights["embed"][token]
    position = (prefix.next_position + state.cursor)[:, None, None]
    cos, sin = text_rotary(config.text, jnp.broadcast_to(position, (len(token), 3, 1)))
    rotary = (cos[:, 0], sin[:, 0])
    kernel, layout = settings.kernel, settings.layout
    kernel = kernel if layout is None else replace(kernel, mesh=layout.mesh)
    caches = []
    for layer_weights, shared, own in zip(
        weights["layers"], prefix.layers, state.layers, strict=True
    ):
        layer = nnx.merge(_abstract_layer(config.text, _is_fused(layer_weights))[0], layer_weights)
        x, own = decode_layer(layer, x, rotary, shared, prefix.valid, own, state.cursor, kernel)
        caches.append(own)
    hidden = rms_norm(x, weights["norm"]["scale"], config.text.rms_norm_eps)
    return replace(state, layers=tuple(caches), hidden=hidden, cursor=state.cursor + 1)


def _draw(
    settings: DecodeSettings, weights: DecodeWeights, keys_BG: Array, state: DecodeState[Array]
) -> tuple[DecodeState[Array], Array]:
    """Draws the next token [B, G] of every sample, and records it for those that continue."""
    head = weights["embed"] if weights["head"] is None else weights["head"]
    logits = jnp.einsum("bgd,vd->bgv", state.hidden, head, preferred_element_type=jnp.float32)
    uniform = None if settings.sampling.temperature == 0 else uniforms(keys_BG, state.cursor)
    token, logprob = sample_group(logits, uniform, settings.sampling, settings.suppressed)
    token = jnp.where(state.finished, 0, token)
    logprob = jnp.where(state.finished, 0.0, logprob)

    def write(rows: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, new[..., None], state.cursor, axis=2)

    stopped = jnp.isin(token, jnp.array(settings.stop_ids, jnp.int32))
    if state.stop_at is not None:
        stopped |= state.cursor + 1 >= state.stop_at
    stopped &= ~state.finished
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
) -> DecodeState[Array]:
    """`cache.initial_state`, constrained to a layout."""
    return constrain(initial_state(config, hidden, group, slots, limit), layout)


@partial(jax.jit, static_argnums=(1, 2))
def join_layers(parts: Sequence[KeyValues], tokens: int, layout: Layout | None = None) -> KeyValues:
    """A layer's prompt caches [B, K, T, H] of several prefills as one, padded to `tokens`."""

    def join(arrays: tuple[Array, ...]) -> Array:
        pads = [[(0, 0), (0, 0), (0, tokens - x.shape[2]), (0, 0)] for x in arrays]
        return jnp.concatenate([jnp.pad(x, pad) for x, pad in zip(arrays, pads, strict=True)])

    keys, values = (join(arrays) for arrays in zip(*parts, strict=True))
    return constrain((keys, values), layout)


@partial(jax.jit, static_argnums=(1, 2))
def join_rows(
    parts: Sequence[tuple[Array, Array, Array]], tokens: int, layout: Layout | None = None
) -> tuple[Array, Array, Array]:
    """Hidden states, `Prefix.valid` and `Prefix.next_position` of several prefills as one."""
    hidden, valid, position = zip(*parts, strict=True)
    valid = [jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]))) for x in valid]
    joined = (jnp.concatenate(hidden), jnp.concatenate(valid), jnp.concatenate(position))
    return constrain(joined, layout)


def join_prefills(
    parts: Sequence[tuple[Array, Prefix[Array]]], layout: Layout | None = None
) -> tuple[Array, Prefix[Array]]:
    """What several prefills gave, as one; their caches are deleted, a layer at a time."""
    if len(parts) == 1:
        return parts[0]
    tokens = max(prefix.valid.shape[1] for _, prefix in parts)
    rows = [(hidden, prefix.valid, prefix.next_position) for hidden, prefix in parts]
    hidden, valid, position = join_rows(rows, tokens, layout)
    layers = []
    for caches in zip(*(prefix.layers for _, prefix in parts), strict=True):
        layers.append(join_layers(caches, tokens, layout))
        delete(caches)
    return hidden, Prefix(tuple(layers), valid, position)


@partial(jax.jit, static_argnums=3)
def select_samples(
    rows_BG: Tree, prompt: np.ndarray, sample: np.ndarray, layout: Layout | None
) -> Tree:
    """The given samples of arrays [B, G, ...]; others are left as they are."""
    return constrain(
        jax.tree.map(lambda x: x[prompt[:, None], sample] if x.ndim else x, rows_BG), layout
    )


@partial(jax.jit, static_argnums=2)
def select_prompts(rows_B: Tree, prompt: np.ndarray, layout: Layout | None) -> Tree:
    """The given rows of arrays [B, ...]."""
    return constrain(jax.tree.map(lambda x: x[prompt], rows_B), layout)


def select(
    state: DecodeState[Array],
    prefix: Prefix[Array],
    keys_BG: Array,
    rows: Rows,
    layout: Layout | None,
) -> tuple[DecodeState[Array], Prefix[Array], Array]:
    """The given rows alone; caches that are replaced are deleted, a layer at a time.

    Args:
      state: the samples so far.
      prefix: the prompts.
      keys_BG: one PRNG key a sample.
      rows: which of them to keep.
      layout: the sharding of caches; None leaves it to the compiler.
    """
    small = (replace(state, layers=()), keys_BG)
    small, keys_BG = select_samples(small, rows.prompt, rows.sample, layout)
    own = []
    for caches in state.layers:
        own.append(select_samples(caches, rows.prompt, rows.sample, layout))
        delete(caches)
    state = replace(small, layers=tuple(own), finished=small.finished | ~rows.used)
    if rows.keeps(len(prefix.valid)):
        return state, prefix, keys_BG
    shared = []
    for caches in prefix.layers:
        shared.append(select_prompts(caches, rows.prompt, layout))
        delete(caches)
    rest = select_prompts((prefix.valid, prefix.next_position), rows.prompt, layout)
    return state, Prefix(tuple(shared), *rest), keys_BG


def pad_prefix(prefix: Prefix[Array], tokens: int, layout: Layout | None) -> Prefix[Array]:
    """The prompts in longer caches; those of `prefix` are deleted, a layer at a time."""
    if prefix.valid.shape[1] == tokens:
        return prefix
    layers = []
    for caches in prefix.layers:
        layers.append(join_layers([caches], tokens, layout))
        delete(caches)
    no_hidden = prefix.valid[:, :0]
    rows = (no_hidden, prefix.valid, prefix.next_position)
    _, valid, position = join_rows([rows], tokens, layout)
    return Prefix(tuple(layers), valid, position)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def merge_arrays(old: Tree, new: Tree, is_new: np.ndarray, layout: Layout | None) -> Tree:
    """Rows of two trees of equal arrays [B, ...]; `old` is donated."""

    def merge(x: Array, y: Array) -> Array:
        return jnp.where(is_new.reshape(-1, *(1,) * (x.ndim - 1)), y, x) if x.ndim else y

    return constrain(jax.tree.map(merge, old, new), layout)


def merge_rows(
    old: RowArrays, new: RowArrays, is_new: np.ndarray, layout: Layout | None
) -> RowArrays:
    """Rows of two sets of as many; the caches of both are deleted, a layer at a time.

    Args:
      old, new: the samples, prompts and keys of each.
      is_new: [B] bool, which rows are taken from `new`.
      layout: the sharding of caches; None leaves it to the compiler.
    """

    def merge_layers(
        mine: DecodeState[Array] | Prefix[Array], others: DecodeState[Array] | Prefix[Array]
    ) -> tuple[KeyValues, ...]:
        layers = []
        for layer, other in zip(mine.layers, others.layers, strict=True):
            layers.append(merge_arrays(layer, other, is_new, layout))
            delete(other)
        return tuple(layers)

    def without_layers(rows: RowArrays) -> RowArrays:
        state, prefix, keys = rows
        return replace(state, layers=()), replace(prefix, layers=()), keys

    own, shared = merge_layers(old[0], new[0]), merge_layers(old[1], new[1])
    small = (without_layers(old), without_layers(new))
    state, prefix, keys = merge_arrays(*small, is_new, layout)
    return replace(state, layers=own), replace(prefix, layers=shared), keys


@partial(jax.jit, static_argnums=(1, 2))
def grow_layer(cache: KeyValues, slots: int, layout: Layout | None = None) -> KeyValues:
    """One layer's cache with `slots` more slots."""
    return constrain(append_slots(cache, slots), layout)


def grow(state: DecodeState[Array], slots: int, layout: Layout | None = None) -> DecodeState[Array]:
    """The same samples with `slots` more cache slots; the caches of `state` are deleted.

    A layer at a time, so that the old and the new caches are not all in memory together.
    """
    layers = []
    for old in state.layers:
        layers.append(grow_layer(old, slots, layout))
        delete(old)
    return replace(state, layers=tuple(layers))


def delete(tree: Any) -> None:
    """Frees arrays now, and not when their last name goes."""
    for x in jax.tree.leaves(tree):
        x.delete()
