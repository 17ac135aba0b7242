"""Training with the group's prompt shared goes the way of training that repeats it."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from spatial_ssrl_jax.data.batching import pad_prompts, prompt_sizes
from spatial_ssrl_jax.data.packing import Content, Group, RowShape, fill_rows
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.rl.batch import GroupBatch
from spatial_ssrl_jax.rl.bucketing import Buckets
from spatial_ssrl_jax.rl.grpo import Grpo, score_rollout
from spatial_ssrl_jax.rl.logprobs import logprobs_of
from spatial_ssrl_jax.rl.losses import sample_weights
from spatial_ssrl_jax.rl.row_shapes import row_shapes
from spatial_ssrl_jax.rl.stages import stages
from spatial_ssrl_jax.rl.train_step import TrainState, train_step
from spatial_ssrl_jax.rollout import engine
from spatial_ssrl_jax.rollout.engine import Rollout
from spatial_ssrl_jax.rollout.sampling import Sampling, sample_keys
from spatial_ssrl_jax.trainer.context import Run, items_of, open_run
from spatial_ssrl_jax.trainer.initial_state import StageInitializer
from spatial_ssrl_jax.trainer.preemption import Preemption

STEPS = 12


def no_resample(_: int):
    raise AssertionError("groups are not filtered here")


@dataclass
class Alone:
    """A GRPO step in which every sample carries a prompt of its own, in groups of one.

    It draws samples of its own, and trains on the ones that it is given: a score that rounding
    moves may change a draw, and the rewards with it.
    """

    grpo: Grpo

    def step(
        self, state: TrainState, batch: Batch, key: jax.Array, given: Rollout
    ) -> tuple[TrainState, dict, Rollout]:
        grpo, group = self.grpo, self.grpo.settings.group_size
        shape = grpo.buckets.shape(*prompt_sizes(batch.prompts).max(axis=0).tolist())
        padded = pad_prompts(batch.prompts, shape.tokens, shape.patches)
        prompts = jax.tree.map(lambda x: np.repeat(x, group, axis=0), padded)
        flat = self.sample(state, prompts, np.repeat(batch.index, group), key)
        rollout = flat.map(self.grouped)
        scored = score_rollout(batch.items, given, grpo.processor, grpo.scorer, grpo.settings)
        count, updates = len(batch.items) // grpo.settings.minibatches_per_rollout, []
        old = [
            self.batch(batch.prompts, scored, i * count, count)
            for i in range(grpo.settings.minibatches_per_rollout)
        ]
        with_old = [self.compared(state, part) for part in old]
        for part in with_old:
            state, metrics = train_step(grpo.loss, grpo.optimizer, state, [part])
            updates.append({k: float(v) for k, v in metrics.items()})
        means = {k: float(np.mean([u[k] for u in updates])) for k in updates[0]}
        return state, means, rollout

    def grouped(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, self.grpo.settings.group_size, *x.shape[2:])

    def sample(self, state: TrainState, prompts, index: np.ndarray, key: jax.Array) -> Rollout:
        grpo = self.grpo
        return grpo.engine.generate(
            state.params,
            grpo.engine.fill(state.params),
            [prompts],
            group_size=1,
            max_new_tokens=grpo.sampling_settings.max_new_tokens,
            key=key,
            prompt_index=[index],
            sampling=Sampling(grpo.settings.temperature),
        )

    def batch(self, prompts: Sequence[Prompt], scored, first: int, count: int) -> GroupBatch:
        """The update over prompts `first` to `first + count`, a row a sample."""
        settings, group = self.grpo.settings, self.grpo.settings.group_size
        cut, limit = slice(first, first + count), scored.rollout.tokens.shape[2]
        length, tokens = scored.rollout.length[cut], scored.rollout.tokens[cut]
        weight = sample_weights(length, np.ones(length.shape, bool), settings.aggregation, limit)
        groups = [
            Group(prompts[first + b], [tokens[b, g, : length[b, g]]])
            for b in range(count)
            for g in range(group)
        ]
        largest = self.grpo.buckets.shapes[-1]
        size = Content(largest.tokens + limit, largest.patches, limit)
        alone = [(number,) for number in range(len(groups))]
        vision = self.grpo.loss.config.vision
        rows, places = fill_rows(groups, alone, RowShape(size, limit), vision)

        def flat(x: np.ndarray) -> np.ndarray:
            return x.reshape(-1, 1, *x.shape[2:])

        return GroupBatch(
            rows=rows,
            weight=places.of_samples(flat(weight)),
            normaliser=np.float32(length.sum()),
            advantage=places.of_samples(flat(scored.advantage[cut])),
            sampled_logprobs=places.of_tokens(flat(scored.rollout.logprobs[cut])),
            old_logprobs=None,
            reference_logprobs=None,
        )

    def compared(self, state: TrainState, batch: GroupBatch) -> GroupBatch:
        loss = self.grpo.loss
        found = [
            logprobs_of(loss.config, loss.compute, loss.settings.temperature, params, batch.rows)
            for params in (state.params, self.grpo.reference)
        ]
        return replace(batch, old_logprobs=found[0], reference_logprobs=found[1])


def keys_of_groups(key: jax.Array, index: np.ndarray, group: int) -> jax.Array:
    """Rows are samples: row i has the key of its prompt's sample i modulo the group's size."""
    assert group == 1
    every = sample_keys(key, index, KEYS_GROUP)
    place = np.arange(len(index)) % KEYS_GROUP
    return every[np.arange(len(index)), place][:, None]


KEYS_GROUP = 3


def open_grpo(config, folder: Path, progress: Progress, preemption: Preemption):
    """A run's parts, a fresh state and the stage."""
    run: Run = open_run(config, folder, False, preemption, progress, ExitStack())
    start = StageInitializer(config, run.model, run.layout, run.checkpoints, lambda _: None)
    (stage,) = stages(config)
    optimizer = stage.optimizer(config)
    state = start.state(stage, optimizer, start.params(stage))
    grpo = Grpo(
        stage.settings,
        config.rollout,
        run.scorer,
        run.engine,
        stage.loss(run.model.config, run.compute),
        optimizer,
        run.layout,
        Buckets.of(config),
        row_shapes(config, stage, run.compute.attention),
        run.processor,
        start.reference(stage, state, fresh=True),
    )
    return run, grpo, state


@pytest.mark.slow
def test_sharing_gives_the_same_curve(toy_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = toy_config()
    config = replace(
        config,
        sft=replace(config.sft, steps=0),
        grpo=replace(config.grpo, steps=STEPS, learning_rate=3e-3),
        eval=replace(config.eval, examples=1),
    )
    assert config.grpo.group_size == KEYS_GROUP
    with Preemption() as preemption, Progress(quiet=True) as progress:
        run, grpo, state = open_grpo(config, tmp_path / "run", progress, preemption)
        alone, other = Alone(grpo), jax.tree.map(lambda x: x + 0, state)
        items = items_of(run, 1, run.source, run.split.train)
        key, size, curve = jax.random.key(0), config.grpo.prompts, []
        for step in range(STEPS):
            rows = [(i, items[step * size + i]) for i in range(size)]
            batch, now = Batch.of(rows), jax.random.fold_in(key, step)
            state, shared, _, scored = grpo.step(state, batch, now, no_resample)
            with monkeypatch.context() as patch:
                patch.setattr(engine, "sample_keys", keys_of_groups)
                other, repeated, rollout = alone.step(other, batch, now, scored.rollout)
            same = rollout.tokens == scored.rollout.tokens
            assert same.mean() > 0.99, f"step {step}: {same.size - same.sum()} of {same.size}"
            print(
                f"measured step {step + 1}: {same.size - same.sum()} of {same.size} tokens differ"
            )
            curve.append((shared, repeated))
    names = ("loss/total", "loss/policy", "kl/mean", "optim/gradient_norm")
    for step, rows in enumerate(curve, 1):
        for kind, row in zip(("shared", "repeated"), rows, strict=True):
            print(f"measured step {step} {kind}:", *(f"{row[name]:.8f}" for name in names))
    for shared, repeated in curve:
        for name in names:
            # Losses and KLs near zero are sums that cancel: held to a millionth there.
            assert shared[name] == pytest.approx(repeated[name], rel=1e-4, abs=1e-6), name
    rewards = [shared["reward/overall_mean"] for shared, _ in curve]
    assert np.ptp(rewards) > 0.02 and curve[-1][0]["kl/mean"] > 1e-4, "nothing was learned"
