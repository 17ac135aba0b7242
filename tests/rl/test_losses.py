"""The policy loss against numbers computed by hand, and the KL estimators."""

import typing
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import GrpoSettings, KlEstimator
from spatial_ssrl_jax.rl.batch import GroupBatch
from spatial_ssrl_jax.rl.losses import (
    KL_ESTIMATORS,
    GrpoLoss,
    grpo_loss,
    importance_weight,
    k1_kl,
    k2_kl,
    k3_kl,
)


def of_token(
    logprob: Array, advantage: float, reference: float | None = None, **settings
) -> tuple[Array, dict[str, Array]]:
    """The loss of a single token whose old and sampled log-probability is 0."""
    one = jnp.zeros((1, 1, 1), jnp.float32)
    batch = GroupBatch(
        prompts=None,
        tokens=one.astype(jnp.int32),
        length=jnp.ones((1, 1), jnp.int32),
        weight=jnp.ones((1, 1)),
        normaliser=jnp.float32(1),
        advantage=jnp.full((1, 1), advantage, jnp.float32),
        sampled_logprobs=one,
        old_logprobs=one,
        reference_logprobs=None if reference is None else one + reference,
    )
    return grpo_loss(GrpoSettings(**settings), batch, jnp.reshape(logprob, (1, 1, 1)), one)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient", "clip"),
    [
        (1.0, 2.0, -2.0, -2.0, None),
        (1.25, 2.0, -2.5, -2.5, None),
        (1.5, 2.0, -2.6, 0.0, "policy/clip_high"),
        (0.5, 2.0, -1.0, -1.0, None),  # below the lower clip the plain term is the larger loss
        (0.5, -1.0, 0.8, 0.0, "policy/clip_low"),
        (1.5, -1.0, 1.5, 1.5, None),
        (4.0, -1.0, 3.0, 0.0, "policy/clip_dual"),
    ],
)
def test_clips(ratio, advantage, expected, gradient, clip):
    logprob = jnp.float32(np.log(ratio))
    value, metrics = of_token(logprob, advantage)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    slope = jax.grad(lambda x: of_token(x, advantage)[0])(logprob)
    assert float(slope) == pytest.approx(gradient, rel=1e-5, abs=1e-6)
    for name in ("policy/clip_low", "policy/clip_high", "policy/clip_dual"):
        assert float(metrics[name]) == float(name == clip)


def test_dual_clip_off():
    value, metrics = of_token(jnp.log(4.0), -1.0, dual_clip=0.0)
    assert float(value) == pytest.approx(4.0, rel=1e-5)
    assert "policy/clip_dual" not in metrics


def test_ratio_is_bounded():
    value, _ = of_token(jnp.float32(100.0), -1.0, dual_clip=0.0)
    assert float(value) == pytest.approx(float(np.exp(20.0)), rel=1e-5)


@pytest.mark.parametrize("kind", typing.get_args(KlEstimator))
def test_the_kl_is_added_with_its_coefficient(kind):
    without, _ = of_token(jnp.float32(0.1), 1.0)
    with_kl, metrics = of_token(jnp.float32(0.1), 1.0, -0.4, kl_coef=0.5, kl_estimator=kind)
    kl = float(KL_ESTIMATORS[kind](jnp.float32(0.1), jnp.float32(-0.4)))
    assert float(with_kl - without) == pytest.approx(0.5 * kl, rel=1e-4)
    assert float(metrics["kl/mean"]) == pytest.approx(kl, rel=1e-5)
    assert float(metrics["loss/kl"]) == pytest.approx(0.5 * kl, rel=1e-5)


def test_k3():
    assert float(k3_kl(jnp.float32(-1.0), jnp.float32(-1.0))) == 0.0
    assert float(k3_kl(jnp.float32(0.0), jnp.float32(1.0))) == pytest.approx(np.e - 2, rel=1e-5)
    assert float(k3_kl(jnp.float32(0.0), jnp.float32(9.0))) == 10.0  # clipped
    assert float(k3_kl(jnp.float32(30.0), jnp.float32(0.0))) == 10.0  # d clipped to -20 first


def test_k1_and_k2():
    logprob, reference = jnp.float32(-1.0), jnp.float32(-3.0)
    assert float(k1_kl(logprob, reference)) == 2.0
    assert float(k2_kl(logprob, reference)) == 2.0
    assert float(k1_kl(logprob, jnp.float32(-1000.0))) == 20.0


def test_gradients_of_the_estimators():
    """With samples from p, the mean gradient of k2 is the KL's, and that of k1's is zero."""
    logits, other = jnp.array([0.3, -0.5, 1.1]), jax.nn.log_softmax(jnp.array([0.0, 0.4, -0.2]))

    def kl(x):
        p = jax.nn.log_softmax(x)
        return jnp.sum(jnp.exp(p) * (p - other))

    def sampled(estimate):
        p = jax.nn.softmax(logits)
        slopes = jax.jacobian(lambda x: estimate(jax.nn.log_softmax(x), other))(logits)
        return p @ slopes

    np.testing.assert_allclose(sampled(k2_kl), jax.grad(kl)(logits), rtol=1e-5)
    np.testing.assert_allclose(sampled(k1_kl), np.zeros(3), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"), [("truncate", [0.5, 1.5, 2.0]), ("mask", [0.5, 1.5, 0.0])]
)
def test_importance_weight(kind, expected):
    gap = jnp.log(jnp.array([0.5, 1.5, 2.5]))  # trainer minus sampler
    np.testing.assert_allclose(importance_weight(kind, gap, 2.0), expected, rtol=1e-5)


def test_kl_without_a_reference_is_refused(mixed_batch):
    batch = replace(mixed_batch, reference_logprobs=None)
    with pytest.raises(UserError, match=r"grpo\.kl_coef=0\.01 needs .* or set"):
        GrpoLoss(None, None, GrpoSettings())(None, batch)
