"""What is compiled ahead of an update is what the update calls."""

from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.monitoring.process_stats import CompilationCounter
from spatial_ssrl_jax.parallel.compile_ahead import CompileAhead
from spatial_ssrl_jax.rl import grpo as grpo_module
from spatial_ssrl_jax.rl.bucketing import BatchShape, Buckets
from spatial_ssrl_jax.rl.grpo import Grpo
from spatial_ssrl_jax.rl.train_step import initial_train_state, train_step
from spatial_ssrl_jax.rl.updates_ahead import UpdatesAhead
from tests.rl.conftest import CONFIG, ROLLOUT, SETTINGS, make_grpo

PROGRAMS = ("vision_features", "logprobs_of", "micro_gradients", "apply_gradients")


class AtOnce(CompileAhead):
    """Does each job when it is added."""

    def add(self, key, job) -> None:
        if key not in self._jobs:
            super().add(key, lambda: None)
            job()


def test_the_first_updates_and_the_next_widths_compile_nothing(small_params, grpo_step):
    settings = replace(SETTINGS, minibatches_per_rollout=3, kl_coef=0.1, freeze=("vision",))
    grpo = make_grpo(settings, ROLLOUT, Buckets((40,), (3,), (4, 8)))
    params = jax.tree.map(jnp.copy, small_params)  # a step donates them
    params = jax.device_put(params, grpo.layout.param_shardings(CONFIG))
    reference = jax.tree.map(lambda x: x + 1, params)
    grpo = replace(grpo, reference=reference, queue=AtOnce(enabled=True))
    state, kl_coef = initial_train_state(grpo.optimizer, params), np.float32(0.1)
    batch, scored = grpo_step
    of_width = {
        width: replace(scored.rollout, length=np.full_like(scored.rollout.length, width))
        for width in (8, 4)
    }
    counter = CompilationCounter()
    grpo._ahead.expect_first(state, reference, batch, kl_coef)
    for width, rollout in of_width.items():
        assert list(grpo.queue._jobs)[-1] == BatchShape(40, 3, width)
        before = counter.programs
        of_step = batch, replace(scored, rollout=rollout), kl_coef
        updates, _ = grpo.micro_batches(state.params, *of_step)
        state, _ = train_step(grpo.loss, grpo.optimizer, state, updates[0])
        assert {n: counter.programs[n] for n in PROGRAMS} == {n: before[n] for n in PROGRAMS}
        grpo._ahead.expect_next(state, reference, chain(*updates))
    assert len(grpo.queue._jobs) == 2
    # Log-probabilities and gradients of both widths, the images' features, the optimizer's step.
    assert counter.count(PROGRAMS) == 6


class Stop(Exception):
    """Ends a step after its updates."""


def test_a_step_asks_before_it_samples_and_before_it_updates(
    small_params, grpo_step, monkeypatch: pytest.MonkeyPatch
):
    batch, scored = grpo_step
    calls: list[str] = []

    def noted(name: str, result: object = None):
        return lambda *_: calls.append(name) or result

    def stop(_: object) -> None:
        raise Stop

    for name in ("expect_first", "claim", "expect_next"):
        monkeypatch.setattr(UpdatesAhead, name, noted(name))
    monkeypatch.setattr(Grpo, "sample", noted("sample", scored.rollout))
    monkeypatch.setattr(Grpo, "_score", lambda *_: scored)
    monkeypatch.setattr(grpo_module, "train_step", noted("update", (None, {})))
    monkeypatch.setattr(grpo_module, "_mean_updates", stop)
    grpo = make_grpo(SETTINGS, ROLLOUT, Buckets((40,), (3,), (8,)))
    with pytest.raises(Stop):
        grpo.step(SimpleNamespace(params=small_params), batch, jax.random.key(0), None)
    # The group that does not vary is left out.
    assert calls == ["expect_first", "sample", "claim", "claim", "expect_next", "update"]
