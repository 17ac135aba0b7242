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
from spatial_ssrl_jax.rollout.cache import Prefix
from spatial_ssrl_jax.rollout.decode import (
    DecodeSettings,
    DecodeWeights,
    decode_chunk,
    decode_weights,
    initial_samples,
    join_prefills,
    prefill,
    reshard_weights,
)
from spatial_ssrl_jax.rollout.decode_ahead import DecodeAhead
from spatial_ssrl_jax.rollout.live_rows import Leftovers, LiveRows
from spatial_ssrl_jax.rollout.sampling import Sampling, sample_keys
from spatial_ssrl_jax.rollout.schedule import (
    RolloutUse,
    Schedule,
    Span,
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
class RolloutBatch:
    """Prompts whose responses are decoded together.

    Attributes:
      prompts: batches of them, on the host or sharded over devices, B in all; each is prefilled by
        itself, when it is taken.
      index: int32, the index in the step of each prompt of each of these batches.
      stop_at: [B, G] int32 tokens after which samples end whatever they are, for timings; of all
        batches of a rollout or of none.
    """

    prompts: Iterable[PromptBatch[np.ndarray] | PromptBatch[Array]]
    index: Sequence[np.ndarray | Array]
    stop_at: np.ndarray | None = None


@dataclass
class _BatchResult:
    """What a batch has when it ends or leaves samples to be decoded with others'.

    Attributes:
      rows: of this process, the fields of `Rollout`.
      length: [B, G] int32, over all processes.
      use: `RolloutUse.of` the final lengths.
    """

    rows: tuple[np.ndarray, ...]
    length: np.ndarray
    use: Callable[[np.ndarray], RolloutUse]

    def replace(self, sample: int, values: Sequence[np.ndarray]) -> None:
        """The fields of one of the B·G samples; there is one process."""
        for whole, value in zip((*self.rows, self.length), (*values, values[2]), strict=True):
            whole[divmod(sample, whole.shape[1])] = value

    def rollout(self) -> Rollout:
        return Rollout(*self.rows, use=self.use(self.length))


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
        self,
        prompts: int,
        group_size: int,
        limit: int,
        prompt_tokens: int,
        sampling: Sampling,
        batches: int = 1,
        longest_prompt: int = 0,
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
            batches=batches,
            longest_prompt=longest_prompt,
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
        """The responses to one rollout batch; see `generate_batches`.

        Args:
          on_tokens: called every `check_every` steps with the tokens [B, G, R] and lengths [B, G]
            so far, on the host. It makes the device wait.
          stop_at: [B, G] int32 tokens after which samples end whatever they are, for timings.

        Raises:
          UserError: `max_new_tokens` is not a multiple of `check_every`.
        """
        (rollout,) = self.generate_batches(
            params,
            weights,
            [RolloutBatch(prompts, prompt_index, stop_at)],
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            key=key,
            sampling=sampling,
            longest_prompt=0,  # one batch leaves nothing
            on_tokens=on_tokens,
        )
        return rollout

    def generate_batches(
        self,
        params: Params,
        weights: DecodeWeights,
        batches: Sequence[RolloutBatch],
        *,
        group_size: int,
        max_new_tokens: int,
        key: Array,
        sampling: Sampling,
        longest_prompt: int,
        on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> list[Rollout]:
        """Samples `group_size` responses of at most `max_new_tokens` tokens to each prompt.

        Args:
          params: the model.
          weights: `fill(params)`.
          batches: of as many prompts each, decoded one after another; in one process their
            leftovers together, see `Schedule.of`.
          group_size: G.
          max_new_tokens: R, a multiple of `check_every`.
          key: the step's key; draws depend only on it, the prompt's index and that in the group.
          sampling: how to draw.
          longest_prompt: tokens of the longest prompts of all batches, padding included; caches of
            leftovers' prompts are as long.
          on_tokens: see `generate`.

        Returns:
          The responses to this process's prompts of each batch, in the order of its prefills. What
          leftovers used counts for the last one.

        Raises:
          UserError: `max_new_tokens` is not a multiple of `check_every`.
        """
        if max_new_tokens % self.check_every:
            raise UserError(
                f"max_new_tokens={max_new_tokens} must be a multiple of "
                f"rollout.check_every={self.check_every}."
            )
        # Who sees the tokens sees all rows of a batch until it ends.
        together = jax.process_count() == 1 and on_tokens is None
        schedule = partial(
            self.schedule,
            sum(map(len, batches[0].index)),
            group_size,
            max_new_tokens,
            sampling=sampling,
            batches=len(batches) if together else 1,
            longest_prompt=longest_prompt,
        )
        settings = self.settings(sampling)
        run = _Run(self, params, weights, settings, schedule, key, longest_prompt, on_tokens)
        for batch in batches:
            run.sample(batch)
        return run.finish()


@dataclass
class _Run:
    """One call of `Engine.generate_batches`.

    Attributes:
      engine, params, weights, key, longest_prompt, on_tokens: see there.
      settings: of the decode programs.
      schedule: of a batch whose prompts have `prompt_tokens` tokens.
    """

    engine: Engine
    params: Params
    weights: DecodeWeights
    settings: DecodeSettings
    schedule: Callable[..., Schedule]
    key: Array
    longest_prompt: int
    on_tokens: Callable[[np.ndarray, np.ndarray], None] | None

    def __post_init__(self):
        self._results: list[_BatchResult] = []
        self._use = RolloutUse()
        self._last = self.schedule(prompt_tokens=self.longest_prompt)
        shape, layout = self._last.leftovers, self.engine.layout
        self._leftovers = None if shape is None else Leftovers(shape, self.longest_prompt, layout)

    def sample(self, batch: RolloutBatch) -> None:
        """Decodes a batch, or as much of it as comes before its last samples wait."""
        config, layout = self.engine.config, self.engine.layout
        hidden, prefix, prompt_lengths, prefilled = self._prefilled(batch.prompts)
        prompt_tokens = prefix.valid.shape[1]
        schedule = self.schedule(prompt_tokens=prompt_tokens)
        shape = schedule.shapes[0]
        limit = schedule.shapes[-1].slots
        state = initial_samples(config.text, shape.group, shape.slots, limit, hidden, layout)
        if batch.stop_at is not None:
            state = replace(state, stop_at=jnp.asarray(batch.stop_at, jnp.int32))
        index = jnp.concatenate([jnp.asarray(part, jnp.int32) for part in batch.index])
        rows = LiveRows(shape, state, prefix, sample_keys(self.key, index, shape.group))
        live = self._decode(rows, schedule)
        self._results.append(_result(rows, prompt_lengths, prompt_tokens, prefilled))
        if self._leftovers is not None and live.any():
            if not self._leftovers.have_room(int(live.sum())):
                self._finish_leftovers()
            self._leftovers.add(len(self._results) - 1, rows, live)

    def finish(self) -> list[Rollout]:
        """The responses to all batches; what leftovers used counts for the last one."""
        self._finish_leftovers()
        *rollouts, last = [result.rollout() for result in self._results]
        return [*rollouts, replace(last, use=last.use + self._use)]

    def _finish_leftovers(self) -> None:
        if self._leftovers is None or (taken := self._leftovers.take()) is None:
            return
        rows, samples = taken
        self._decode(rows, self._last)
        fields = jax.device_get(rows.write())
        for place, (batch, sample) in enumerate(samples):
            self._results[batch].replace(sample, [x[place, 0] for x in fields])
        self._use += RolloutUse.of_spans(rows.spans, self.longest_prompt)

    def _decode(self, rows: LiveRows, schedule: Schedule) -> np.ndarray:
        """Decodes rows until all have finished, or until they wait for those of other batches.

        Returns:
          [b, g] bool, which of them have not finished.
        """
        engine, limit = self.engine, schedule.shapes[-1].slots
        are_leftovers = rows.cursor > 0
        ahead = DecodeAhead(engine.queue, engine.config, self.settings, schedule)
        if not are_leftovers:
            ahead.expect(self.weights, rows.state, rows.prefix, rows.keys)
        while True:
            if rows.cursor:
                live = ~gather_to_host(rows.state.finished)
                if rows.cursor >= limit or not live.any():
                    break
                if not are_leftovers and schedule.may_wait(rows.shape, rows.cursor):
                    if schedule.fits_leftovers(live):
                        break
                    self._finish_leftovers()  # the batch needs their memory
                # Who sees the tokens sees all rows.
                live = np.ones_like(live) if self.on_tokens else live
                shape = schedule.next_shape(rows.shape, live, rows.cursor)
                ahead.claim(shape)
                rows.resize(shape, live, engine.layout)
            steps = schedule.steps(rows.shape, rows.cursor)
            if self.on_tokens:
                steps = engine.check_every
            args = (self.weights, rows.prefix, rows.state, rows.keys)
            rows.state = decode_chunk(engine.config, self.settings, steps, *args)
            rows.spans.append(Span(rows.shape, rows.cursor, rows.cursor + steps))
            rows.cursor += steps
            if self.on_tokens:
                self.on_tokens(*jax.device_get((rows.state.tokens, rows.state.length)))
        longest, last = int(gather_to_host(rows.state.length).max()), rows.spans[-1]
        taken = schedule.steps_taken(longest, last.start, last.steps)
        rows.spans[-1] = replace(last, end=last.start + taken)
        return live & (rows.cursor < limit)

    def _prefilled(
        self, prompts: Iterable[PromptBatch[np.ndarray] | PromptBatch[Array]]
    ) -> tuple[Array, Prefix[Array], list[np.ndarray | Array], int]:
        """What all prefills give, the lengths of each batch's prompts, and tokens with padding.

        At most two batches of pixels are on the device, and none while responses are decoded.
        """
        engine = self.engine
        filled, lengths, tokens = [], [], 0
        for batch in prompts:
            filled.append(prefill(engine.config, engine.compute, self.params, batch, engine.layout))
            lengths.append(batch.length)
            tokens += batch.ids.shape[0] * batch.ids.shape[1]
            if len(filled) > 1:
                filled[-2][0].block_until_ready()
        hidden, prefix = join_prefills(filled, engine.layout)
        return hidden, prefix, lengths, tokens


def _result(
    rows: LiveRows, prompt_lengths: list[np.ndarray | Array], prompt_tokens: int, prefilled: int
) -> _BatchResult:
    """What a batch has, of the lengths of each prefill's prompts, padded to `prompt_tokens`."""
    written, spans = rows.write(), rows.spans
    prompt_length = np.concatenate([gather_to_host(jnp.asarray(x)) for x in prompt_lengths])

    def use(length_BG: np.ndarray) -> RolloutUse:
        return RolloutUse.of(spans, length_BG, prompt_length, prompt_tokens, prefilled)

    length = np.array(gather_to_host(written[2]))
    return _BatchResult(_local_rows(written, prompt_lengths), length, use)


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
