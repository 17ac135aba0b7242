"""Sampling G responses to each of B prompts, with everything about a prompt done once.

Images are encoded and prompts prefilled once. Between chunks of decode steps the host grows the
response cache, and once half of the groups have finished it continues with the others alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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
from spatial_ssrl_jax.qwen_vl.param_tree import Params
from spatial_ssrl_jax.rollout.cache import DecodeState, Prefix, constrain
from spatial_ssrl_jax.rollout.decode import (
    DecodeSettings,
    DecodeWeights,
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
    """The responses to this process's B prompts, on the host.

    Attributes:
      tokens: [B, G, R] int32, zero after each response's length.
      logprobs: [B, G, R] float32 log-probabilities under the sampler.
      length: [B, G] int32 tokens, the end token included.
      finished: [B, G] bool; False is truncated at `max_new_tokens`.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    length: np.ndarray
    finished: np.ndarray


def concatenate_rollouts(rollouts: Sequence[Rollout], index: np.ndarray) -> Rollout:
    """The rollouts of a batch's rollout batches as one.

    Args:
      rollouts: those of the rollout batches.
      index: [B] int, the row in the batch of each of their prompts, in the rollouts' order.
    """
    fields, order = ("tokens", "logprobs", "length", "finished"), np.argsort(index)
    return Rollout(*(np.concatenate([getattr(r, f) for r in rollouts])[order] for f in fields))


@dataclass(frozen=True)
class Engine:
    """Runs rollouts.

    Attributes:
      config: the model's shape.
      compute: how to compute.
      stop_ids: tokens that end a response.
      kv_block: slots that the cache of responses grows by.
      check_every: decode steps between checks of whether all have finished; divides `kv_block`.
      shards: shards of the batch axis; a batch never shrinks below one group a shard.
      layout: the sharding of weights and caches for sampling; None leaves it to the compiler.
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
    def fused(self) -> bool:
        """Whether the decode weights are a `FusedProjectionLayer`'s: with the kernel `triton`."""
        return self.compute.decode_attention.name == "triton"

    def fill(self, params: Params) -> DecodeWeights:
        """The decode weights of `params`, to be made once a step and freed before the update."""
        weights = decode_weights(self.config, params, self.compute.dtype, self.fused)
        if self.layout is None:
            return weights
        return reshard_weights(self.config, self.layout, weights)

    def settings(self, sampling: Sampling) -> DecodeSettings:
        """The static settings of its decode programs."""
        suppressed, kernel = self.config.vision_tokens, self.compute.decode_attention
        return DecodeSettings(
            sampling, self.stop_ids, suppressed, self.check_every, self.layout, kernel
        )

    def generate(
        self,
        params: Params,
        weights: DecodeWeights,
        prompts: PromptBatch[np.ndarray] | PromptBatch[Array],
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
          prompts: B prompts, on the host or sharded over devices.
          group_size: G.
          max_new_tokens: R, a multiple of `check_every`.
          key: the step's key; draws depend only on it, `prompt_index` and the index in the group.
          prompt_index: [B] int32, each prompt's index in the step.
          sampling: how to draw.
          on_tokens: called every `check_every` steps with the tokens [B, G, R] and lengths [B, G]
            so far, on the host. It makes the device wait.

        Raises:
          UserError: `max_new_tokens` is not a multiple of `check_every`.
        """
        if max_new_tokens % self.check_every:
            raise UserError(
                f"max_new_tokens={max_new_tokens} must be a multiple of "
                f"rollout.check_every={self.check_every}."
            )
        settings = self.settings(sampling)
        hidden, prefix = prefill(self.config, self.compute, params, prompts, self.layout)
        keys = sample_keys(key, jnp.asarray(prompt_index, jnp.int32), group_size)
        slots = min(self.kv_block, max_new_tokens)
        state = initial_samples(
            self.config.text, group_size, slots, max_new_tokens, hidden, self.layout
        )
        rows, written, done = np.arange(len(hidden)), None, 0  # rows: the groups that are decoded
        while True:
            steps = slots - done if on_tokens is None else self.check_every
            state = decode_chunk(self.config, settings, steps, weights, prefix, state, keys)
            done += steps
            if on_tokens is not None:
                on_tokens(*jax.device_get((state.tokens, state.length)))
            unfinished = ~gather_to_host(_finished_groups(state))
            if done >= max_new_tokens or not unfinished.any():
                break
            if done < slots:
                continue
            size = self._batch_size(len(hidden), int(unfinished.sum()))
            if size < len(rows) and on_tokens is None:
                written = _write(written, state, rows)
                kept = np.sort(np.argsort(~unfinished, kind="stable")[:size])
                state, prefix, keys = _take((state, prefix, keys), kept, self.layout)
                rows = rows[kept]
            slots = min(done + self.kv_block, max_new_tokens)
            state = grow(state, slots - done, self.layout)
        written = _write(written, state, rows)
        return Rollout(*local_shards(written, getattr(prompts.length, "sharding", None)))

    def _batch_size(self, whole: int, unfinished: int) -> int:
        """Groups to continue with: the smallest batch that holds all unfinished ones.

        The whole batch, half or a quarter of it, since each size is a program of its own; and no
        less than one group a shard.
        """
        sizes = [whole // divisor for divisor in (1, 2, 4) if whole % (divisor * self.shards) == 0]
        return min([size for size in sizes if size >= unfinished], default=whole)


@jax.jit
def _finished_groups(state: DecodeState[Array]) -> Array:
    """[B] bool: all samples of the group have finished."""
    return state.finished.all(axis=1)


@partial(jax.jit, static_argnums=2)
def _take(
    tree: tuple[DecodeState[Array], Prefix[Array], Array], rows: np.ndarray, layout: Layout | None
) -> tuple[DecodeState[Array], Prefix[Array], Array]:
    """The given groups alone."""
    return constrain(jax.tree.map(lambda x: x[rows] if x.ndim else x, tree), layout)


@jax.jit
def _write(
    written: tuple[Array, ...] | None, state: DecodeState[Array], rows: np.ndarray
) -> tuple[Array, ...]:
    """The fields of `Rollout` of the whole batch, updated at the rows that are decoded."""
    new = (state.tokens, state.logprobs, state.length, state.finished)
    if written is None:
        return new
    return tuple(old.at[rows].set(x) for old, x in zip(written, new, strict=True))
