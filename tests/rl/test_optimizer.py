"""Every setting of the optimizer, against AdamW and its schedules in a few lines of NumPy."""

from dataclasses import fields, replace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spatial_ssrl_jax.config.schema import ModelSettings, OptimSettings, StageSettings
from spatial_ssrl_jax.rl.optimizer import learning_rate, make_optimizer
from spatial_ssrl_jax.rl.stages import stages
from tests.helpers.toy_runs import make_config

STEPS = 6
OPTIM = OptimSettings(beta1=0.8, beta2=0.9, eps=1e-3, max_grad_norm=1.5)
STAGE = StageSettings(
    steps=STEPS, learning_rate=0.02, warmup_ratio=0.5, schedule="cosine", weight_decay=0.1
)


def rate_at(stage: StageSettings, step: int) -> float:
    """Linear over the warm-up, from zero; then constant, or a half cosine to zero."""
    warmup = np.ceil(stage.warmup_ratio * STEPS)
    if step < warmup:
        return stage.learning_rate * step / warmup
    if stage.schedule == "constant":
        return stage.learning_rate
    return stage.learning_rate * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (STEPS - warmup)))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.5])
def test_the_learning_rate_at_every_step(schedule: str, ratio: float):
    stage = replace(STAGE, schedule=schedule, warmup_ratio=ratio)
    found = [float(np.asarray(learning_rate(stage, STEPS)(step))) for step in range(STEPS)]
    np.testing.assert_allclose(found, [rate_at(stage, step) for step in range(STEPS)], rtol=1e-6)


def by_hand(optim: OptimSettings, stage: StageSettings, gradients: np.ndarray) -> np.ndarray:
    """The weights, of which the first three are the vision tower's, after all steps."""
    weights, first, second = np.ones(gradients.shape[1]), 0.0, 0.0
    for step, gradient in enumerate(gradients):
        norm = np.sqrt((gradient**2).sum())
        gradient = gradient * min(1.0, optim.max_grad_norm / norm)
        first = optim.beta1 * first + (1 - optim.beta1) * gradient
        second = optim.beta2 * second + (1 - optim.beta2) * gradient**2
        change = (first / (1 - optim.beta1 ** (step + 1))) / (
            np.sqrt(second / (1 - optim.beta2 ** (step + 1))) + optim.eps
        )
        change = rate_at(stage, step) * (change + stage.weight_decay * weights)
        change[:3] *= stage.vision_learning_rate_scale
        weights = weights - change
    return weights


def after(optim: OptimSettings, stage: StageSettings, gradients: np.ndarray) -> np.ndarray:
    def split(x: np.ndarray) -> dict:
        return {"vision": {"blocks": jnp.asarray(x[:3])}, "text": {"norm": jnp.asarray(x[3:])}}

    optimizer = make_optimizer(optim, stage, STEPS)
    weights = split(np.ones(gradients.shape[1], np.float32))
    state = optimizer.init(weights)
    for gradient in gradients.astype(np.float32):
        changes, state = optimizer.update(split(gradient), state, weights)
        weights = optax.apply_updates(weights, changes)
    return np.concatenate([weights["vision"]["blocks"], weights["text"]["norm"]])


CHANGED = {
    "beta1": 0.5,
    "beta2": 0.99,
    "eps": 0.1,
    "max_grad_norm": 0.2,
    "learning_rate": 0.01,
    "warmup_ratio": 0.0,
    "schedule": "constant",
    "weight_decay": 0.0,
    "vision_learning_rate_scale": 0.25,
}


@pytest.mark.parametrize("name", ["as they are", *CHANGED])
def test_each_setting_is_adamws(name: str):
    """Gradients above and below the norm, of both signs; each setting changes the weights."""
    gradients = (
        np.random.default_rng(0).normal(size=(STEPS, 7)) * np.linspace(0.1, 2, STEPS)[:, None]
    )
    optim, stage = OPTIM, STAGE
    if name in {f.name for f in fields(OptimSettings)}:
        optim = replace(optim, **{name: CHANGED[name]})
    elif name in CHANGED:
        stage = replace(stage, **{name: CHANGED[name]})
    found = after(optim, stage, gradients)
    np.testing.assert_allclose(found, by_hand(optim, stage, gradients), rtol=2e-5)
    if name in CHANGED:
        assert np.abs(found - after(OPTIM, STAGE, gradients)).max() > 1e-4


def test_a_stages_updates_and_seed_are_its_own():
    """GRPO makes several updates a rollout; its schedule is over all of them."""
    config = make_config(ModelSettings())
    grpo = replace(config.grpo, steps=5, minibatches_per_rollout=2, warmup_ratio=0.2)
    sft, stage = stages(replace(config, seed=3, grpo=grpo, sft=replace(config.sft, steps=4)))
    assert (sft.start_step, sft.last_step, sft.updates, sft.seed) == (0, 4, 4, 6)
    assert (stage.start_step, stage.last_step, stage.updates, stage.seed) == (4, 9, 10, 7)
    assert [stage.steps_left(step) for step in (0, 4, 6, 9, 12)] == [5, 5, 3, 0, 0]
    assert float(np.asarray(stage.learning_rate()(1))) == pytest.approx(grpo.learning_rate / 2)
    (alone,) = stages(replace(config, sft=replace(config.sft, steps=0), grpo=grpo))
    assert alone.name == "grpo" and alone.start_step == 0
