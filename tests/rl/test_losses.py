"""The policy loss against numbers worked by hand and a per-sample reference from METHOD.md."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import GrpoSettings
from spatial_ssrl_jax.rl.losses import GrpoLoss, k1_kl, k2_kl, k3_kl


def make_loss(**changes) -> GrpoLoss:
    return GrpoLoss(None, None, GrpoSettings(**changes))


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
def test_policy_terms(ratio, advantage, expected, gradient, clip):
    old = -1.5
    logprob = jnp.float32(old + np.log(ratio))
    loss = make_loss()
    value, stats = loss.policy_terms(logprob, old, jnp.float32(advantage))
    assert float(value) == pytest.approx(expected, rel=1e-5)
    slope = jax.grad(lambda x: loss.policy_terms(x, old, jnp.float32(advantage))[0])(logprob)
    assert float(slope) == pytest.approx(gradient, rel=1e-5, abs=1e-6)
    for name in ("policy/clip_low", "policy/clip_high", "policy/clip_dual"):
        assert float(stats[name]) == float(name == clip)


def test_dual_clip_off():
    value, stats = make_loss(dual_clip=0.0).policy_terms(jnp.log(4.0), 0.0, jnp.float32(-1.0))
    assert float(value) == pytest.approx(4.0, rel=1e-5)
    assert "policy/clip_dual" not in stats


def test_ratio_is_bounded():
    value, _ = make_loss(dual_clip=0.0).policy_terms(jnp.float32(100.0), 0.0, jnp.float32(-1.0))
    assert float(value) == pytest.approx(float(np.exp(20.0)), rel=1e-5)


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
def test_correction(kind, expected):
    loss = make_loss(correction=kind, importance_max=2.0)
    found = loss.correction(jnp.log(jnp.array([0.5, 1.5, 2.5])))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_kl_without_a_reference_is_refused(mixed_batch):
    batch = replace(mixed_batch, reference_logprobs=None)
    with pytest.raises(UserError, match=r"grpo\.kl_coef=0\.01 needs .* or set"):
        make_loss()(None, batch)
