"""What is compiled ahead of an update is what the update calls."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.data.packing import Content, RowShape
from spatial_ssrl_jax.monitoring.process_stats import CompilationCounter
from spatial_ssrl_jax.parallel.compile_ahead import CompileAhead
from spatial_ssrl_jax.rl import grpo as grpo_module
from spatial_ssrl_jax.rl.grpo import Grpo
from spatial_ssrl_jax.rl.train_step import initial_train_state, train_step
from spatial_ssrl_jax.rl.updates_ahead import UpdatesAhead
from tests.rl.conftest import CONFIG, ROW, SETTINGS, make_grpo

PROGRAMS = ("vision_features", "logprobs_of", "micro_gradients", "apply_gradients")


class AtOnce(CompileAhead):
    """Does each job when it is added."""

    def add(self, key, job) -> None:
        if key not in self._jobs:
            super().add(key, lambda: None)
            job()


# What fits the first shape is in it, and a longer group in the other.
SHAPES = (RowShape(Content(60, 192, 16), 8), ROW)


def test_updates_compile_nothing(small_params, grpo_step):
    settings = replace(SETTINGS, minibatches_per_rollout=3, kl_coef=0.1, freeze=("vision",))
    grpo = make_grpo(settings, SHAPES)
    params = jax.tree.map(jnp.copy, small_params)  # a step donates them
    params = jax.device_put(params, grpo.layout.param_shardings(CONFIG))
    reference = jax.tree.map(lambda x: x + 1, params)
    grpo = replace(grpo, reference=reference, queue=AtOnce(enabled=True))
    state, kl_coef = initial_train_state(grpo.optimizer, params), np.float32(0.1)
    batch, scored = grpo_step
    counter = CompilationCounter()
    grpo._ahead.expect(state, reference, kl_coef)
    before = counter.programs
    # Log-probabilities and gradients of both shapes, the images' features, the optimizer's step.
    assert counter.count(PROGRAMS) == 6 and len(grpo.queue._jobs) == 2
    for tokens in (4, 8):
        length = np.full_like(scored.rollout.length, tokens)
        rollout = replace(scored.rollout, length=length)
        of_step = batch, replace(scored, rollout=rollout), kl_coef
        updates, _ = grpo.micro_batches(state.params, *of_step)
        found = {micro.rows.ids.shape[1] for update in updates for micro in update}
        assert found == ({60} if tokens == 4 else {72})
        state, _ = train_step(grpo.loss, grpo.optimizer, state, updates[0])
        assert {n: counter.programs[n] for n in PROGRAMS} == {n: before[n] for n in PROGRAMS}


class Stop(Exception):
    """Ends a step after its updates."""


def test_a_step_asks_before_it_samples(small_params, grpo_step, monkeypatch: pytest.MonkeyPatch):
    batch, scored = grpo_step
    calls: list[str] = []

    def noted(name: str, result: object = None):
        return lambda *_: calls.append(name) or result

    def stop(_: object) -> None:
        raise Stop

    for name in ("expect", "claim"):
        monkeypatch.setattr(UpdatesAhead, name, noted(name))
    monkeypatch.setattr(Grpo, "sample", noted("sample", scored.rollout))
    monkeypatch.setattr(Grpo, "_score", lambda *_: scored)
    monkeypatch.setattr(grpo_module, "train_step", noted("update", (None, {})))
    monkeypatch.setattr(grpo_module, "_mean_updates", stop)
    grpo = make_grpo(SETTINGS)
    with pytest.raises(Stop):
        grpo.step(SimpleNamespace(params=small_params), batch, jax.random.key(0), None)
    # The group that does not vary is left out.
    assert calls == ["expect", "sample", "claim", "claim", "update"]
