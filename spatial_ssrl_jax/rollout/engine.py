"""Sampling G responses to each of B prompts, with everything about a prompt done once.

Images are encoded and prompts prefilled once. Between decode steps the host grows the response
cache, and continues with the unfinished samples alone, as `schedule.py` says.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.parallel.collectives import gather_to_host, local_shards
from spatial_ssrl_jax.parallel.compile_ahead import CompileAhead
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch
from spatial_ssrl_jax.qwen_vl.param_tree import Params
from spatial_ssrl_jax.rollout.cache import DecodeState, Prefix
from spatial_ssrl_jax.rollout.decode import (
    DecodeSettings,
    DecodeWeights,
    decode_chunk,
    decode_weights,
    grow,
    initial_samples,
    join_prefills,
    prefill,
    reshard_weights,
    select,
)
from spatial_ssrl_jax.rollout.decode_ahead import DecodeAhead
from spatial_ssrl_jax.rollout.sampling import Sampling, sample_keys
from spatial_ssrl_jax.rollout.schedule import (
    DecodeShape,
    RolloutUse,
    Schedule,
    Span,
    select_rows,
)


@dataclass(frozen=True)
class Rollout:
    """The responses to this process's B prompts, on the host.

    Attributes:
      tokens: [B, G, R] int32, zero after each response's length.
      logprobs: [B, G, R] float32 log-probabilities under the sampler.
      length: [B, G] int32 tokens, the end token included.
      finished: [B, G] bool; False is truncated at `max_new_tokens`.
      use: of rows and caches, over all processes.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    length: np.ndarray
    finished: np.ndarray
    use: RolloutUse = RolloutUse()

    def map(self, function: Callable[..., np.ndarray], *others: "Rollout") -> "Rollout":
        """The function of each array of this and other rollouts; what they used is added up."""
        rollouts = (self, *others)
        names = ("tokens", "logprobs", "length", "finished")
        arrays = {name: function(*(getattr(r, name) for r in rollouts)) for name in names}
        return Rollout(**arrays, use=sum((r.use for r in rollouts), RolloutUse()))


def concatenate_rollouts(rollouts: Sequence[Rollout], index: np.ndarray) -> Rollout:
    """The rollouts of a batch's rollout batches as one.

    Args:
      rollouts: those of the rollout batches.
      index: [B] int, the row in the batch of each of their prompts, in the rollouts' order.
    """
    order = np.argsort(index)
    first, *others = rollouts
    return first.map(lambda *arrays: np.concatenate(arrays)[order], *others)


@dataclass(frozen=True)
class Engine:
    """Runs rollouts.

    Attributes:
      config: the model's shape.
      compute: how to compute.
      stop_ids: tokens that end a response.
      kv_block: slots of the cache of responses at the start; they double.
      check_every: decode steps between checks of whether all have finished; divides `kv_block`.
      shards: shards of the batch axis; a batch never shrinks below one prompt a shard.
      layout: the sharding of weights and caches for sampling; None leaves it to the compiler.
      queue: compiles the programs of a rollout's later sizes, where there is a layout.
    """

    config: QwenVLConfig
    compute: Compute
    stop_ids: tuple[int, ...]
    kv_block: int = 256
    check_every: int = 8
    shards: int = 1
    layout: Layout | None = None
    queue: CompileAhead = CompileAhead(enabled=False)

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

    def schedule(
        self, prompts: int, group_size: int, limit: int, prompt_tokens: int, sampling: Sampling
    ) -> Schedule:
        """When which rows are decoded; see `Schedule.of`."""
        return Schedule.of(
            prompts,
            group_size,
            limit,
            kv_block=self.kv_block,
            check_every=self.check_every,
            prompt_tokens=prompt_tokens,
            shards=self.shards,
            whole_groups=sampling.greedy_last,
        )

    def generate(
        self,
        params: Params,
        weights: DecodeWeights,
        prompts: Iterable[PromptBatch[np.ndarray] | PromptBatch[Array]],
        *,
        group_size: int,
        max_new_tokens: int,
        key: Array,
        prompt_index: Sequence[np.ndarray | Array],
        sampling: Sampling,
        on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
        stop_at: np.ndarray | None = None,
    ) -> Rollout:
        """Samples `group_size` responses of at most `max_new_tokens` tokens to each prompt.

        Args:
          params: the model.
          weights: `fill(params)`.
          prompts: batches of prompts, on the host or sharded over devices, B in all; each is
            prefilled by itself, when it is taken, and all are decoded together.
          group_size: G.
          max_new_tokens: R, a multiple of `check_every`.
          key: the step's key; draws depend only on it, `prompt_index` and the index in the group.
          prompt_index: int32, the index in the step of each prompt of each batch.
          sampling: how to draw.
          on_tokens: called every `check_every` steps with the tokens [B, G, R] and lengths [B, G]
            so far, on the host. It makes the device wait.
          stop_at: [B, G] int32 tokens after which samples end whatever they are, for timings.

        Returns:
          The responses to this process's prompts of each batch, one batch after another.

        Raises:
          UserError: `max_new_tokens` is not a multiple of `check_every`.
        """
        if max_new_tokens % self.check_every:
            raise UserError(
                f"max_new_tokens={max_new_tokens} must be a multiple of "
                f"rollout.check_every={self.check_every}."
            )
        hidden, prefix, prompt_lengths, prefilled = self._prefilled(params, prompts)
        total, prompt_tokens = prefix.valid.shape
        schedule = self.schedule(total, group_size, max_new_tokens, prompt_tokens, sampling)
        shape, settings, spans = schedule.shapes[0], self.settings(sampling), list[Span]()
        state = initial_samples(
            self.config.text, group_size, shape.slots, max_new_tokens, hidden, self.layout
        )
        if stop_at is not None:
            state = replace(state, stop_at=jnp.asarray(stop_at, jnp.int32))
        index = jnp.concatenate([jnp.asarray(part, jnp.int32) for part in prompt_index])
        sample = np.arange(shape.samples).reshape(total, group_size)
        rows = _LiveRows(shape, state, prefix, sample_keys(key, index, group_size), sample)
        ahead = DecodeAhead(self.queue, self.config, settings, schedule)
        ahead.expect(weights, rows.state, rows.prefix, rows.keys)
        cursor = 0
        while True:
            steps = self.check_every if on_tokens else schedule.steps(rows.shape, cursor)
            args = (weights, rows.prefix, rows.state, rows.keys)
            rows.state = decode_chunk(self.config, settings, steps, *args)
            spans.append(Span(rows.shape, cursor, cursor + steps))
            cursor += steps
            if on_tokens:
                on_tokens(*jax.device_get((rows.state.tokens, rows.state.length)))
            live = ~gather_to_host(rows.state.finished)
            if cursor >= max_new_tokens or not live.any():
                break
            # Who sees the tokens sees all rows.
            live = np.ones_like(live) if on_tokens else live
            shape = schedule.next_shape(rows.shape, live, cursor)
            ahead.claim(shape)
            rows.resize(shape, live, self.layout)
        written = rows.write()
        length = gather_to_host(written[2])
        last = schedule.steps_taken(int(length.max()), spans[-1].start, spans[-1].steps)
        spans[-1] = replace(spans[-1], end=spans[-1].start + last)
        prompt_length = np.concatenate([gather_to_host(jnp.asarray(x)) for x in prompt_lengths])
        use = RolloutUse.of(spans, length, prompt_length, prompt_tokens, prefilled)
        return Rollout(*_local_rows(written, prompt_lengths), use=use)

    def _prefilled(
        self, params: Params, prompts: Iterable[PromptBatch[np.ndarray] | PromptBatch[Array]]
    ) -> tuple[Array, Prefix[Array], list[np.ndarray | Array], int]:
        """What all prefills give, the lengths of each batch's prompts, and tokens with padding.

        No batch is kept, whose pixels would take memory while responses are decoded.
        """
        filled, lengths, tokens = [], [], 0
        for batch in prompts:
            filled.append(prefill(self.config, self.compute, params, batch, self.layout))
            lengths.append(batch.length)
            tokens += batch.ids.shape[0] * batch.ids.shape[1]
        hidden, prefix = join_prefills(filled, self.layout)
        return hidden, prefix, lengths, tokens


@dataclass
class _LiveRows:
    """The rows that are decoded, and the results of those that have left.

    Attributes:
      shape: their number, and slots of their caches.
      state: what they have.
      prefix: of their prompts.
      keys: one PRNG key a sample.
      sample: [b, g] int, which of all B·G samples each is; B·G where it is none.
      written: the fields of `Rollout` of all samples when rows left last; None before.
    """

    shape: DecodeShape
    state: DecodeState[Array]
    prefix: Prefix[Array]
    keys: Array
    sample: np.ndarray
    written: tuple[Array, Array, Array, Array] | None = None

    def __post_init__(self):
        self._total = self.sample.size

    def write(self) -> tuple[Array, Array, Array, Array]:
        """The fields of `Rollout` of all samples."""
        return _write(self.written, self.state, self.sample)

    def resize(self, shape: DecodeShape, live_BG: np.ndarray, layout: Layout | None) -> None:
        """Continues with the live samples in another shape."""
        if not shape.has_rows_of(self.shape):
            self.written = self.write()
            rows = select_rows(live_BG, shape)
            self.state, self.prefix, self.keys = select(
                self.state, self.prefix, self.keys, rows, layout
            )
            self.sample = np.where(rows.used, rows.of(self.sample), self._total)
        if shape.slots > self.shape.slots:
            self.state = grow(self.state, shape.slots - self.shape.slots, layout)
        self.shape = shape


def _local_rows(
    arrays: tuple[Array, ...], batches: Sequence[np.ndarray | Array]
) -> tuple[np.ndarray, ...]:
    """This process's rows of batches that are sharded as the given arrays, one after another."""
    first, found = 0, list[tuple[np.ndarray, ...]]()
    for batch in batches:
        part = _slice(arrays, first, len(batch)) if len(batches) > 1 else arrays
        found.append(local_shards(part, getattr(batch, "sharding", None)))
        first += len(batch)
    return tuple(map(np.concatenate, zip(*found, strict=True)))


@partial(jax.jit, static_argnums=2)
def _slice(arrays: tuple[Array, ...], first: int, count: int) -> tuple[Array, ...]:
    """`count` rows of each array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, count), arrays)


@jax.jit
def _write(
    written: tuple[Array, Array, Array, Array] | None,
    state: DecodeState[Array],
    sample_BG: np.ndarray,
) -> tuple[Array, Array, Array, Array]:
    """The fields of `Rollout` of all samples, updated at those that are decoded."""
    new = (state.tokens, state.logprobs, state.length, state.finished)
    if written is None:
        return new

    def update(old: Array, x: Array) -> Array:
        flat = old.reshape(-1, *old.shape[2:])
        return flat.at[sample_BG].set(x, mode="drop").reshape(old.shape)

    return jax.tree.map(update, written, new)
