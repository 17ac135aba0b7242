"""One GRPO step: sample groups, score them, compare within groups, update."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import optax
from jax import Array

from spatial_ssrl_jax.config import GrpoSettings, RolloutSettings
from spatial_ssrl_jax.data.pipeline import Batch, Item
from spatial_ssrl_jax.data.prompts import Processor
from spatial_ssrl_jax.learn.advantage import group_advantage
from spatial_ssrl_jax.learn.batch import GroupBatch, take_rows
from spatial_ssrl_jax.learn.logprobs import response_logprobs
from spatial_ssrl_jax.learn.loss import GrpoLoss
from spatial_ssrl_jax.learn.reward import Reward, score
from spatial_ssrl_jax.learn.update import TrainState, train_step
from spatial_ssrl_jax.qwen2_5_vl.model import Params
from spatial_ssrl_jax.rollout.engine import Engine, Rollout, join
from spatial_ssrl_jax.rollout.sampling import Sampling
from spatial_ssrl_jax.run.mesh import Layout, fetch

Metrics = dict[str, float]


@dataclass(frozen=True)
class Scored:
    """A rollout with its texts, rewards and advantages.

    Attributes:
      rollout: what was sampled.
      texts: B lists of G responses.
      rewards: B lists of G rewards.
      advantage: [B, G] float32.
    """

    rollout: Rollout
    texts: list[list[str]]
    rewards: list[list[Reward]]
    advantage: np.ndarray


def score_rollout(
    items: Sequence[Item], rollout: Rollout, processor: Processor, settings: GrpoSettings
) -> Scored:
    """Decodes every response, rewards it and takes the groups' advantages."""
    texts = [
        [processor.decode(t[:n]) for t, n in zip(tokens, lengths, strict=True)]
        for tokens, lengths in zip(rollout.tokens, rollout.length, strict=True)
    ]
    rewards = [
        [score(text, item.example.answer, settings.accuracy_weight) for text in group]
        for item, group in zip(items, texts, strict=True)
    ]
    overall = np.array([[r.overall for r in group] for group in rewards])
    return Scored(rollout, texts, rewards, group_advantage(overall, settings.scale_std))


@dataclass(frozen=True)
class Grpo:
    """The stage's fixed parts; `step` does one rollout with its updates.

    Attributes:
      settings, sampling_settings: the config's `grpo` and `rollout` sections.
      engine: samples.
      loss: the policy loss.
      optimizer: the gradient transformation.
      layout: where batches lie.
      processor: decodes responses.
      reference: the weights that GRPO started from, or None without KL.
    """

    settings: GrpoSettings
    sampling_settings: RolloutSettings
    engine: Engine
    loss: GrpoLoss
    optimizer: optax.GradientTransformation
    layout: Layout
    processor: Processor
    reference: Params | None

    def step(
        self, state: TrainState, batch: Batch, key: Array
    ) -> tuple[TrainState, Metrics, Scored]:
        """Samples groups for the batch's prompts and makes the updates over them.

        Args:
          state: where training stands; donated.
          batch: this process's prompts.
          key: the step's key.

        Returns:
          The new state, the step's metrics, and the scored rollout for the log.
        """
        clock = _Clock()
        rollout = self.sample(state.params, batch, key)
        clock.lap("perf/rollout_seconds")
        scored = score_rollout(batch.items, rollout, self.processor, self.settings)
        clock.lap("perf/reward_seconds")
        groups = self._groups(state.params, batch, scored)
        clock.lap("perf/reference_seconds")
        updates = []
        for batches in groups:
            state, metrics = train_step(self.loss, self.optimizer, state, batches)
            updates.append(metrics)
        metrics = _mean_updates(jax.device_get(updates))
        clock.lap("perf/update_seconds")
        tokens = int(batch.prompts.length.sum() + rollout.length.sum())
        seconds = clock.total()
        return (
            state,
            rollout_metrics(batch.items, scored, self.sampling_settings.limit)
            | prompt_metrics(batch)
            | metrics
            | clock.laps
            | {
                "perf/tokens_per_second": tokens / seconds,
                "perf/rollout_tokens_per_second": float(
                    rollout.length.sum() / clock.laps["perf/rollout_seconds"]
                ),
            },
            scored,
        )

    def sample(self, params: Params, batch: Batch, key: Array) -> Rollout:
        """Samples the batch's groups, `rollout.wave` prompts at a time."""
        weights = self.engine.fill(params)
        rows = self.sampling_settings.wave // jax.process_count()
        waves = []
        for start in range(0, len(batch.items), rows):
            waves.append(
                self.engine.generate(
                    params,
                    weights,
                    self.layout.put_batch(take_rows(batch.prompts, start, rows)),
                    group=self.settings.group,
                    limit=self.sampling_settings.limit,
                    key=key,
                    prompt_index=self.layout.put_batch(batch.index[start : start + rows]),
                    sampling=Sampling(self.settings.temperature),
                )
            )
        return join(waves)

    def _groups(self, params: Params, batch: Batch, scored: Scored) -> list[list[GroupBatch]]:
        """Micro-batches of each update, with old and reference log-probabilities filled in."""
        rollout = scored.rollout
        chunk = self.sampling_settings.chunk
        width = min(-(-int(rollout.length.max()) // chunk) * chunk, self.sampling_settings.limit)
        rows = self.settings.micro_prompts // jax.process_count()
        per_update = len(batch.items) // self.settings.updates
        recompute_old = self.settings.updates > 1
        updates = []
        for first in range(0, len(batch.items), per_update):
            lengths = rollout.length[first : first + per_update]
            cut = slice(first, first + per_update)
            whole = GroupBatch(
                prompts=take_rows(batch.prompts, first, per_update),
                tokens=rollout.tokens[cut, :, :width],
                length=lengths,
                normaliser=np.float32(fetch(lengths.sum())),
                advantage=scored.advantage[cut],
                sampled_logprobs=rollout.logprobs[cut, :, :width],
                old_logprobs=None,
                reference_logprobs=None,
            )
            micro = []
            for start in range(0, per_update, rows):
                piece = self.layout.put_batch(take_rows(whole, start, rows))
                micro.append(self._with_logprobs(params, piece, recompute_old))
            updates.append(micro)
        return updates

    def _with_logprobs(self, params: Params, batch: GroupBatch, old: bool) -> GroupBatch:
        program = partial(_logprobs, self.loss.config, self.loss.compute, self.loss.temperature)
        return replace(
            batch,
            old_logprobs=program(params, batch) if old else None,
            reference_logprobs=(
                program(self.reference, batch) if self.reference is not None else None
            ),
        )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _logprobs(config, compute, temperature: float, params: Params, batch: GroupBatch) -> Array:
    return response_logprobs(
        config, compute, params, batch.prompts, batch.tokens, batch.length, temperature
    )[0]


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
    joined = {}
    for name in updates[0]:
        values = [float(u[name]) for u in updates]
        if name.endswith("_max"):
            joined[name] = max(values)
        elif name == "optim/skipped":
            joined[name] = sum(values)
        else:
            joined[name] = sum(values) / len(values)
    return joined


def prompt_metrics(batch: Batch) -> Metrics:
    """How long the prompts are and how much of their bucket is padding."""
    length = batch.prompts.length
    return {
        "prompt/length_mean": float(length.mean()),
        "prompt/padding_share": float(1 - length.sum() / batch.prompts.ids.size),
        "prompt/dropped": float(sum(len(item.skipped) for item in batch.items)),
    }


def rollout_metrics(items: Sequence[Item], scored: Scored, limit: int) -> Metrics:
    """Rewards, advantages and lengths of a step, over all and per task."""
    arrays = {
        name: np.array([[getattr(r, name) for r in group] for group in scored.rewards])
        for name in ("overall", "accuracy", "format")
    }
    metrics: Metrics = {}
    for name, values in arrays.items():
        metrics[f"reward/{name}_mean"] = float(values.mean())
        metrics[f"reward/{name}_std"] = float(values.std())
    tasks = np.array([item.example.task for item in items])
    for task in sorted(set(tasks)):
        rows = tasks == task
        metrics[f"task/{task}/reward"] = float(arrays["overall"][rows].mean())
        metrics[f"task/{task}/accuracy"] = float(arrays["accuracy"][rows].mean())
        metrics[f"task/{task}/format"] = float(arrays["format"][rows].mean())
        metrics[f"task/{task}/count"] = float(rows.sum())
    overall, length = arrays["overall"], scored.rollout.length
    return metrics | {
        "advantage/mean": float(scored.advantage.mean()),
        "advantage/std": float(scored.advantage.std()),
        "advantage/zero_variance_share": float(np.mean(overall.max(1) == overall.min(1))),
        "response/length_mean": float(length.mean()),
        "response/length_min": float(length.min()),
        "response/length_max": float(length.max()),
        "response/clipped_share": float(np.mean(~scored.rollout.finished)),
    }
