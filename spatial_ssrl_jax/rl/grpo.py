"""One GRPO step: sample groups, score them, compare within groups, update."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import numpy as np
import optax
from jax import Array

from spatial_ssrl_jax.config.schema import GrpoSettings, RolloutSettings
from spatial_ssrl_jax.data.batching import prompt_sizes
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.packing import Group, RowShape, fill_rows
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.parallel import offload
from spatial_ssrl_jax.parallel.collectives import all_sum
from spatial_ssrl_jax.parallel.compile_ahead import CompileAhead
from spatial_ssrl_jax.parallel.host_gap import HostGap
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.inputs import VisionInput
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.rl.advantages import group_advantage, groups_to_update
from spatial_ssrl_jax.rl.batch import GroupBatch
from spatial_ssrl_jax.rl.bucketing import Buckets, bucket_by_length
from spatial_ssrl_jax.rl.logprobs import logprobs_of, vision_features
from spatial_ssrl_jax.rl.losses import GrpoLoss, sample_weights
from spatial_ssrl_jax.rl.placement import prefill_prompts
from spatial_ssrl_jax.rl.resampling import filtered_groups, resample_groups
from spatial_ssrl_jax.rl.row_shapes import MicroBatch, pack_micro_batches
from spatial_ssrl_jax.rl.scorer import SampledGroup, Scorer
from spatial_ssrl_jax.rl.step_metrics import (
    Metrics,
    ScoredRollout,
    gather_ordered,
    prompt_metrics,
    prompt_rows,
    rollout_metrics,
    rollout_rows,
)
from spatial_ssrl_jax.rl.train_step import TrainState, train_step
from spatial_ssrl_jax.rl.updates_ahead import UpdatesAhead
from spatial_ssrl_jax.rollout.engine import Engine, Rollout, RolloutBatch, concatenate_rollouts
from spatial_ssrl_jax.rollout.sampling import Sampling


def score_rollout(
    items: Sequence[Item],
    rollout: Rollout,
    processor: Processor,
    scorer: Scorer,
    settings: GrpoSettings,
) -> ScoredRollout:
    """Decodes every response, rewards it and takes the groups' advantages."""
    texts = [
        [processor.decode(t[:n]) for t, n in zip(tokens, lengths, strict=True)]
        for tokens, lengths in zip(rollout.tokens, rollout.length, strict=True)
    ]
    rewards = scorer.score(
        [
            SampledGroup(item.example, group, lengths.tolist())
            for item, group, lengths in zip(items, texts, rollout.length, strict=True)
        ]
    )
    overall = np.array([[r.overall for r in group] for group in rewards])
    advantage = group_advantage(overall, settings.advantage, settings.scale_rewards)
    return ScoredRollout(rollout, texts, rewards, advantage)


@dataclass(frozen=True)
class UpdatedGroups:
    """What the updates over a rollout compute on this process.

    Attributes:
      groups: [b] bool, the groups that may have a gradient; the others are left out.
      padded_tokens: of all micro-batches' rows, padding included.
    """

    groups: np.ndarray
    padded_tokens: int

    def padding_share(self, batch: Batch, rollout: Rollout) -> float:
        """The fraction of the tokens in all processes' rows that is padding."""
        tokens = prompt_sizes(batch.prompts)[:, 0] + rollout.length.sum(axis=1)
        return 1 - all_sum(tokens[self.groups].sum()) / all_sum(self.padded_tokens)


@dataclass(frozen=True)
class Grpo:
    """The stage's fixed parts; `step` does one rollout with its updates.

    Attributes:
      settings, sampling_settings: the config's `grpo` and `rollout` sections.
      scorer: rewards responses.
      engine: samples.
      loss: the policy loss.
      optimizer: the gradient transformation.
      layout: where batches are.
      buckets: sizes of prompts that prefill is compiled for.
      shapes: of an update's rows.
      processor: decodes responses.
      reference: the weights that GRPO started from, or None without KL.
      queue: compiles programs of updates before they are called.
      gap: measures how long the devices wait for the host; without those waits in a rollout.
    """

    settings: GrpoSettings
    sampling_settings: RolloutSettings
    scorer: Scorer
    engine: Engine
    loss: GrpoLoss
    optimizer: optax.GradientTransformation
    layout: Layout
    buckets: Buckets
    shapes: tuple[RowShape, ...]
    processor: Processor
    reference: Params | None
    queue: CompileAhead = CompileAhead(enabled=False)
    gap: HostGap = field(default_factory=HostGap)

    @property
    def _ahead(self) -> UpdatesAhead:
        return UpdatesAhead(
            self.queue, self.settings, self.loss, self.optimizer, self.layout, self.shapes
        )

    def step(
        self,
        state: TrainState,
        batch: Batch,
        key: Array,
        resample: Callable[[int], Batch],
        kl_coef: np.float32 | None = None,
    ) -> tuple[TrainState, Metrics, Batch, ScoredRollout]:
        """Samples groups for the batch's prompts and makes the updates over them.

        Args:
          state: the state before the step; donated.
          batch: this process's prompts.
          key: the step's key.
          resample: gives the prompts of resample 1, 2, …; called only with
            `filter_groups`.
          kl_coef: of this step, see `scheduled_kl_coef`.

        Returns:
          The new state, the step's metrics, and the prompts trained on with their scored rollout.
        """
        clock, resampled = _Clock(), 0
        self._ahead.expect(state, self.reference, kl_coef)
        rollout = self._sampled(state.params, batch, key)
        clock.lap("perf/rollout_seconds")
        scored = self._score(batch, rollout)
        clock.lap("perf/reward_seconds")
        if self.settings.filter_groups:

            def draw(number: int) -> tuple[Batch, ScoredRollout]:
                drawn = resample(number)
                rollout = self._sampled(state.params, drawn, jax.random.fold_in(key, number))
                return drawn, self._score(drawn, rollout)

            batch, scored, resampled = resample_groups(batch, scored, draw, self.settings)
            clock.lap("perf/refill_seconds")
        minibatches, updated = self.micro_batches(state.params, batch, scored, kl_coef)
        scored = replace(scored, updated=updated.groups)
        clock.lap("perf/reference_seconds")
        updates = []
        self.gap.end()
        for micro_batches in minibatches:
            state, metrics = train_step(self.loss, self.optimizer, state, micro_batches)
            updates.append(metrics)
        metrics = _mean_updates(jax.device_get(updates))
        self.gap.begin()
        clock.lap("perf/update_seconds")
        rows = gather_ordered(prompt_rows(batch) | rollout_rows(batch.items, scored))
        tokens = int(rows["prompt_length"].sum() + rows["length"].sum())
        metrics |= rollout_metrics(rows) | prompt_metrics(rows) | clock.laps
        metrics["perf/update_padding_share"] = updated.padding_share(batch, scored.rollout)
        metrics["perf/tokens_per_second"] = tokens / clock.total()
        metrics["perf/rollout_tokens_per_second"] = float(
            rows["length"].sum() / clock.laps["perf/rollout_seconds"]
        )
        samples = rows["length"].size
        repeated = rows["prompt_length"].sum() * (samples // len(rows["length"]) - 1)
        metrics["perf/repeated_tokens_per_second"] = float(tokens + repeated) / clock.total()
        metrics["perf/samples_per_second"] = samples / clock.total()
        metrics |= {f"perf/{name}": value for name, value in scored.rollout.use.metrics().items()}
        metrics["prompt/refilled"] = all_sum(resampled)
        return state, metrics, batch, scored

    def _sampled(self, params: Params, batch: Batch, key: Array) -> Rollout:
        self.gap.end()
        rollout = self.sample(params, batch, key)
        self.gap.begin()
        return rollout

    def _score(self, batch: Batch, rollout: Rollout) -> ScoredRollout:
        return score_rollout(batch.items, rollout, self.processor, self.scorer, self.settings)

    def sample(self, params: Params, batch: Batch, key: Array) -> Rollout:
        """Samples the batch's groups, so many prompts of like length at a time as settings say."""
        weights, settings = self.engine.fill(params), self.sampling_settings
        together = settings.batch_prompts or len(batch.prompts) * jax.process_count()
        shards = math.lcm(self.layout.batch_shards, self.engine.shards)
        size = prefill_prompts(together, settings.prefill_prompts, shards)
        rows = size // jax.process_count()
        slices = bucket_by_length(prompt_sizes(batch.prompts), rows, self.buckets)
        batches = []
        for first in range(0, len(slices), together // size):
            parts = slices[first : first + together // size]
            prompts = (self.layout.put_batch(part.pad(batch.prompts)) for part in parts)
            index = [self.layout.put_batch(batch.index[part.rows]) for part in parts]
            batches.append(RolloutBatch(prompts, index))
        rollouts = self.engine.generate_batches(
            params,
            weights,
            batches,
            group_size=self.settings.group_size,
            max_new_tokens=settings.max_new_tokens,
            key=key,
            sampling=Sampling(self.settings.temperature),
            longest_prompt=max(part.shape.tokens for part in slices),
        )
        return concatenate_rollouts(rollouts, np.concatenate([part.rows for part in slices]))

    def micro_batches(
        self,
        params: Params,
        batch: Batch,
        scored: ScoredRollout,
        kl_coef: np.float32 | None = None,
    ) -> tuple[list[list[GroupBatch[Array]]], UpdatedGroups]:
        """Each update's micro-batches, with old and reference log-probabilities filled in.

        The batch's order says which prompts belong to which update; within an update their groups
        are packed into rows, which changes nothing, as a token's weight is that in the whole
        update. Groups that have no gradient are left out.

        Returns:
          The micro-batches of each update, and which groups are in them.
        """
        rollout, settings = scored.rollout, self.settings
        per_update = len(batch.items) // settings.minibatches_per_rollout
        weight, updated = self._weights(scored, per_update)
        reference = None if self.reference is None else offload.to_device(self.reference)
        updates, padded_tokens = [], 0
        for first in range(0, len(batch.items), per_update):
            chosen = first + np.flatnonzero(updated[first : first + per_update])
            tokens = np.float32(max(all_sum(rollout.length[chosen].sum()), 1))
            groups = [self._group(batch, rollout, number) for number in chosen.tolist()]
            micro_batches = []
            for part in self._packed(groups):
                packed = self._micro_batch(part, groups, chosen, scored, weight, tokens)
                packed = self.layout.put_batch(replace(packed, kl_coef=kl_coef))
                self._ahead.claim(packed)
                packed = self._with_features(params, packed)
                micro_batches.append(self._with_logprobs(params, reference, packed, first == 0))
                padded_tokens += part.padded_tokens
            updates.append(micro_batches)
        return updates, UpdatedGroups(updated, padded_tokens)

    def _group(self, batch: Batch, rollout: Rollout, number: int) -> Group:
        lengths = zip(rollout.tokens[number], rollout.length[number], strict=True)
        return Group(batch.prompts[number], [tokens[:length] for tokens, length in lengths])

    def _packed(self, groups: Sequence[Group]) -> list[MicroBatch]:
        contents, rows = [group.content for group in groups], self.settings.micro_batch_rows
        return pack_micro_batches(contents, self.shapes, rows, self.loss.config)

    def _micro_batch(
        self,
        part: MicroBatch,
        groups: Sequence[Group],
        chosen: np.ndarray,
        scored: ScoredRollout,
        weight: np.ndarray,
        tokens: np.float32,
    ) -> GroupBatch[np.ndarray]:
        """A part of an update.

        Args:
          part: its rows.
          groups: of the update.
          chosen: their numbers in the rollout.
          scored: the rollout.
          weight: [b, G] of the rollout's samples.
          tokens: response tokens of the update.
        """
        rows, places = fill_rows(groups, part.rows, part.shape, self.loss.config.vision)
        rollout = scored.rollout
        return GroupBatch(
            rows=rows,
            weight=places.of_samples(weight[chosen]),
            normaliser=np.asarray(tokens),
            advantage=places.of_samples(scored.advantage[chosen]),
            sampled_logprobs=places.of_tokens(rollout.logprobs[chosen]),
            old_logprobs=None,
            reference_logprobs=None,
        )

    def _weights(self, scored: ScoredRollout, per_update: int) -> tuple[np.ndarray, np.ndarray]:
        """[b, G] float32 weight of each token of a sample, and [b] bool the groups to compute."""
        settings, rollout = self.settings, scored.rollout
        counted = rollout.finished | (not settings.mask_truncated_completions)
        if settings.filter_groups:
            counted &= ~filtered_groups(settings, scored)[:, None]
        weights, updated = [], []
        for first in range(0, len(counted), per_update):
            mine = slice(first, first + per_update)
            weight = sample_weights(
                rollout.length[mine],
                counted[mine],
                settings.aggregation,
                self.sampling_settings.max_new_tokens,
            )
            weights.append(weight)
            updated.append(groups_to_update(weight, scored.advantage[mine], settings.kl_coef > 0))
        return np.concatenate(weights), np.concatenate(updated)

    def _with_features(self, params: Params, batch: GroupBatch[Array]) -> GroupBatch[Array]:
        """The batch with features of its images in place of pixels, where those are reused."""
        rows, loss = batch.rows, self.loss
        vision = rows.vision
        assert isinstance(vision, VisionInput)  # as put there
        if not self.settings.reuses_vision or vision.length == 0:
            return batch
        merge = not self.settings.trains("merger")
        self.gap.end()
        features = vision_features(loss.config, loss.compute, merge, params, vision)
        features = jax.device_put(features, self.layout.batch_sharding())
        return replace(batch, rows=replace(rows, vision=features))

    def _with_logprobs(
        self, params: Params, reference: Params | None, batch: GroupBatch[Array], is_first: bool
    ) -> GroupBatch[Array]:
        """The batch with the log-probabilities before the updates, of trainer and reference.

        Those of the trainer are the current ones in the first update. That has an array of the same
        shape and sharding in their place, so that all updates run one program.
        """
        loss = self.loss
        program = partial(logprobs_of, loss.config, loss.compute, self.settings.temperature)
        old = first_update = None
        if self.settings.recomputes_old_logprobs:
            old = batch.sampled_logprobs
            if not is_first:
                self.gap.end()
                old = jax.device_put(program(params, batch.rows), old.sharding)
            first_update = self.layout.put_batch(np.bool_(is_first))
        if reference is not None:
            self.gap.end()
        return replace(
            batch,
            old_logprobs=old,
            reference_logprobs=None if reference is None else program(reference, batch.rows),
            first_update=first_update,
        )


class _Clock:
    """Seconds of consecutive phases."""

    def __init__(self):
        self.laps: Metrics = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

    def total(self) -> float:
        return self._last - self._start


def _mean_updates(updates: list[Metrics]) -> Metrics:
    """Means over a rollout's updates; maxima for `_max`, sums for what was skipped."""
    merged = {}
    for name in updates[0]:
        values = [float(u[name]) for u in updates]
        if name.endswith("_max"):
            merged[name] = max(values)
        elif name == "optim/skipped":
            merged[name] = sum(values)
        else:
            merged[name] = sum(values) / len(values)
    return merged
