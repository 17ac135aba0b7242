"""Sampling G responses to each of B prompts, with everything about a prompt done once.

Images are encoded and prompts prefilled once. Between chunks of decode steps the host lengthens
the response cache, and once half of the groups have finished it continues with the others alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.parallel.collectives import gather_to_host, local_shards
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.rollout.cache import DecodeState, Prefix, constrained
from spatial_ssrl_jax.rollout.decode import (
    DecodeSettings,
    decode_chunk,
    decode_weights,
    grow,
    initial_samples,
    prefill,
    reshard_weights,
)
from spatial_ssrl_jax.rollout.sampling import Sampling, sample_keys


@dataclass(frozen=True)
class Rollout:
    """What was sampled for this process's B prompts, on the host.

    Attributes:
      tokens: [B, G, R] int32, zero after each response's length.
      logprobs: [B, G, R] float32 log-probabilities under the sampler.
      length: [B, G] int32 tokens, the end token included.
      finished: [B, G] bool; False was cut off at the max_new_tokens.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    length: np.ndarray
    finished: np.ndarray


def concatenate_rollouts(rollouts: Sequence[Rollout], places: np.ndarray) -> Rollout:
    """Rollouts of parts of a batch as one.

    Args:
      rollouts: the parts.
      places: [B] where each of their prompts, one part after another, is in the batch.
    """
    fields, order = ("tokens", "logprobs", "length", "finished"), np.argsort(places)
    return Rollout(*(np.concatenate([getattr(r, f) for r in rollouts])[order] for f in fields))


@dataclass(frozen=True)
class Engine:
    """Runs whole rollouts.

    Attributes:
      config: the model's shape.
      compute: dtype and chunks.
      stop_ids: tokens that end a response.
      kv_block: response places that the cache grows by.
      check_every: decode steps between looks at whether all have finished; divides `kv_block`.
      shards: parts that the batch axis is cut into; a batch never shrinks below one group a part.
      layout: for sampling, where its weights and caches are; None leaves it to the compiler.
    """

    config: QwenVLConfig
    compute: Compute
    stop_ids: tuple[int, ...]
    kv_block: int = 256
    check_every: int = 8
    shards: int = 1
    layout: Layout | None = None

    def __post_init__(self):
        if self.kv_block % self.check_every:
            raise UserError(
                f"rollout.kv_block={self.kv_block} must be a multiple of "
                f"rollout.check_every={self.check_every}."
            )

    @property
    def joined(self) -> bool:
        """Whether the decode weights are a `JoinedLayer`'s: on GPUs, and there beside `triton`."""
        return self.compute.decode_attention.name == "triton"

    def fill(self, params: Params) -> dict[str, Any]:
        """The decode weights of `params`, to be made once a step and freed before the update."""
        weights = decode_weights(self.config, params, self.compute.dtype, self.joined)
        if self.layout is None:
            return weights
        return reshard_weights(self.config, self.layout, weights)

    def settings(self, sampling: Sampling) -> DecodeSettings:
        """What its decode programs are compiled with."""
        suppressed, kernel = self.config.vision_tokens, self.compute.decode_attention
        return DecodeSettings(
            sampling, self.stop_ids, suppressed, self.check_every, self.layout, kernel
        )

    def generate(
        self,
        params: Params,
        weights: dict[str, Any],
        prompts: PromptBatch,
        *,
        group_size: int,
        max_new_tokens: int,
        key: Array,
        prompt_index: np.ndarray,
        sampling: Sampling,
        on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> Rollout:
        """Samples `group_size` responses of at most `max_new_tokens` tokens to each prompt.

        Args:
          params: the model.
          weights: `fill(params)`.
          prompts: B prompts.
          group_size: G.
          max_new_tokens: R, a multiple of `check_every`.
          key: the step's key; draws depend on it, the prompt's index and the sample's place alone.
          prompt_index: [B] int32, each prompt's place in the step.
          sampling: how to draw.
          on_tokens: called each `check_every` steps with the tokens [B, G, R] and lengths [B, G]
            so far, on the host. It makes the device wait, so leave it out where speed counts.

        Raises:
          UserError: `max_new_tokens` is not a multiple of `check_every`.
        """
        if max_new_tokens % self.check_every:
            raise UserError(
                f"max_new_tokens={max_new_tokens} must be a multiple of rollout.check_every={self.check_every}."
            )
        settings = self.settings(sampling)
        hidden, prefix = prefill(self.config, self.compute, params, prompts, self.layout)
        keys = sample_keys(key, jnp.asarray(prompt_index, jnp.int32), group_size)
        slots = min(self.kv_block, max_new_tokens)
        state = initial_samples(
            self.config.text, group_size, slots, max_new_tokens, hidden, self.layout
        )
        rows, written, done = np.arange(len(hidden)), None, 0
        while True:
            steps = slots - done if on_tokens is None else self.check_every
            state = decode_chunk(self.config, settings, steps, weights, prefix, state, keys)
            done += steps
            if on_tokens is not None:
                on_tokens(*jax.device_get((state.tokens, state.length)))
            going = ~gather_to_host(_closed(state))
            if done >= max_new_tokens or not going.any():
                break
            if done < slots:
                continue
            size = self._size(len(hidden), int(going.sum()))
            if size < len(rows) and on_tokens is None:
                written = _write(written, state, rows)
                kept = np.sort(np.argsort(~going, kind="stable")[:size])
                state, prefix, keys = _take((state, prefix, keys), kept, self.layout)
                rows = rows[kept]
            slots = min(done + self.kv_block, max_new_tokens)
            state = grow(state, slots - done, self.layout)
        written = _write(written, state, rows)
        return Rollout(*local_shards(written, getattr(prompts.length, "sharding", None)))

    def _size(self, whole: int, going: int) -> int:
        """Groups to continue with: the whole batch or a part of it that holds all that are going.

        Halves and quarters only, and no less than one group a shard: each is a program of its own.
        """
        parts = [whole // part for part in _PARTS if whole % (part * self.shards) == 0]
        return min([size for size in parts if size >= going], default=whole)


_PARTS = (1, 2, 4)


@jax.jit
def _closed(state: DecodeState) -> Array:
    """[B] bool: all samples of the group have finished."""
    return state.finished.all(axis=1)


@partial(jax.jit, static_argnums=2)
def _take(
    tree: tuple[DecodeState, Prefix, Array], rows: Array, layout: Layout | None
) -> tuple[DecodeState, Prefix, Array]:
    """The given groups alone."""
    return constrained(jax.tree.map(lambda x: x[rows] if x.ndim else x, tree), layout)


@jax.jit
def _write(written: tuple[Array, ...] | None, state: DecodeState, rows: Array) -> tuple[Array, ...]:
    """What the groups have so far, at their places among all groups of the batch."""
    new = (state.tokens, state.logprobs, state.length, state.finished)
    if written is None:
        return new
    return tuple(old.at[rows].set(x) for old, x in zip(written, new, strict=True))
