"""The policy loss against numbers computed by hand, and the KL estimators."""

import typing
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

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
    scheduled_kl_coef,
)


def of_token(
    logprob: Array, advantage: float, reference: float | None = None, **settings
) -> tuple[Array, dict[str, Array]]:
    """The loss of a single token whose old and sampled log-probability is 0."""
    one = jnp.zeros((1, 1), jnp.float32)
    batch = GroupBatch(
        rows=SimpleNamespace(mask=1 + one, sample=one.astype(jnp.int32)),
        weight=1 + one,
        normaliser=jnp.float32(1),
        advantage=advantage + one,
        sampled_logprobs=one,
        old_logprobs=one,
        reference_logprobs=None if reference is None else one + reference,
    )
    return grpo_loss(GrpoSettings(**settings), batch, jnp.reshape(logprob, (1, 1)), one)


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
    ("kind", "expected"), [("truncate", [0.4, 0.6, 1.5, 2.0]), ("mask", [0.0, 0.6, 1.5, 0.0])]
)
def test_importance_weight(kind, expected):
    gap = jnp.log(jnp.array([0.4, 0.6, 1.5, 2.5]))  # trainer minus sampler
    found, bounded = importance_weight(kind, gap, 2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert bounded.tolist() == [float(kind == "mask"), 0, 0, 1]


def of_samples(
    settings: GrpoSettings,
    logprob: Sequence[Sequence[float]],
    length: Sequence[int],
    advantage: Sequence[float],
    sampled: Sequence[Sequence[float]] | None = None,
) -> tuple[float, np.ndarray, dict[str, float]]:
    """Loss, its gradient and metrics of a group; old log-probabilities are 0, a token's weight 1.

    `sampled` is also 0 unless given; `length` of them are a sample's tokens, the rest is not in the
    row, which ends with two tokens of padding of log-probability 5.
    """
    samples, width = np.shape(logprob)
    held = np.arange(width) < np.array(length)[:, None]

    def row(values: np.ndarray, padding: float = 0.0) -> Array:
        """[1, R]: the samples' tokens one after another, and padding."""
        return jnp.array([[*np.asarray(values)[held], padding, padding]], jnp.float32)

    sample = row(np.arange(samples)[:, None] + 0 * held, -1).astype(jnp.int32)
    values = row(logprob, 5.0)
    batch = GroupBatch(
        rows=SimpleNamespace(mask=row(held), sample=sample),
        weight=row(held),
        normaliser=jnp.float32(sum(length)),
        advantage=row(np.array(advantage)[:, None] + 0 * held),
        sampled_logprobs=0 * values if sampled is None else row(sampled, -7.0),
        old_logprobs=0 * values,
        reference_logprobs=None,
    )

    def loss(x: Array) -> tuple[Array, dict[str, Array]]:
        return grpo_loss(settings, batch, x, 0 * x)

    (value, metrics), slope = jax.value_and_grad(loss, has_aux=True)(values)
    assert not slope[0, -2:].any()
    slopes = np.zeros(held.shape, np.float32)
    slopes[held] = slope[0, :-2]
    return float(value), slopes, {k: float(v) for k, v in metrics.items()}


def test_gspo():
    """The log-ratios' means are 0.1, not clipped, and -0.2, clipped at 0.9; a 5 is padding.

    e^0.1 = 1.105171: with A = 2 each token of the first adds -2.210342, and with A = -1 each of
    the second 0.9, also its first one, whose own ratio is above 1.
    """
    settings = GrpoSettings(policy_loss="gspo", clip_low=0.1, clip_high=0.2)
    logprob = [[0.3, -0.1, 5.0, 5.0], [0.2, -0.5, -0.3, 5.0]]
    value, slope, metrics = of_samples(settings, logprob, [2, 3], [2.0, -1.0])
    assert value == pytest.approx(2 * -2.210342 + 3 * 0.9, rel=1e-5)
    np.testing.assert_allclose(slope, [[-2.210342, -2.210342, 0, 0], [0, 0, 0, 0]], rtol=1e-5)
    assert metrics["policy/clip_low"] == pytest.approx(3 / 5)
    assert metrics["policy/clip_high"] == 0
    assert metrics["policy/ratio_mean"] == pytest.approx((2 * 1.105171 + 3 * 0.818731) / 5)


def test_gspo_has_the_gradient_of_the_sequences_ratio():
    """Of A·s with s = exp(mean): at each of n tokens A·s/n, once the weights are 1/n."""
    settings = GrpoSettings(policy_loss="gspo")
    _, slope, _ = of_samples(settings, [[0.1, 0.2, -0.6, 9.0]], [3], [1.0])
    np.testing.assert_allclose(slope / 3, [[-0.904837 / 3] * 3 + [0]], rtol=1e-5)  # e^-0.1


def test_cispo():
    """Weights e^0.5 -> 1.3, e^-0.5 -> 0.8, e^0.1 = 1.105171, each with a gradient; the -5 is none.

    With A = 2: -2·(1.3·0.5 + 0.8·-0.5 + 1.105171·0.1) = -0.721034.
    """
    settings = GrpoSettings(policy_loss="cispo")
    value, slope, metrics = of_samples(settings, [[0.5, -0.5, 0.1, -5.0]], [3], [2.0])
    assert value == pytest.approx(-0.721034, rel=1e-5)
    np.testing.assert_allclose(slope, [[-2.6, -1.6, -2.210342, 0]], rtol=1e-5)
    assert metrics["policy/clip_high"] == metrics["policy/clip_low"] == pytest.approx(1 / 3)
    assert "policy/clip_dual" not in metrics


@pytest.mark.parametrize(
    ("level", "kind", "expected", "mean", "clipped"),
    [
        # ρ of the tokens: 1.5, 1.5 and 2.5, 0.5; their products: 2.25 and 1.25. A = 1, ratio 1.
        ("token", "truncate", [[1.5, 1.5, 0], [2, 0.5, 0]], 5.5 / 4, 1 / 4),
        ("token", "mask", [[1.5, 1.5, 0], [0, 0.5, 0]], 3.5 / 4, 1 / 4),
        ("sequence", "truncate", [[2, 2, 0], [1.25, 1.25, 0]], 6.5 / 4, 2 / 4),
        ("sequence", "mask", [[0, 0, 0], [1.25, 1.25, 0]], 2.5 / 4, 2 / 4),
    ],
)
def test_importance_correction(level, kind, expected, mean, clipped):
    settings = GrpoSettings(importance_correction=kind, importance_level=level, importance_max=2.0)
    sampled = -np.log([[1.5, 1.5, 7.0], [2.5, 0.5, 7.0]])  # the trainer's are 0
    value, slope, metrics = of_samples(settings, np.zeros((2, 3)), [2, 2], [1.0, 1.0], sampled)
    np.testing.assert_allclose(slope, -np.array(expected), rtol=1e-5)
    assert value == pytest.approx(-np.sum(expected), rel=1e-5)
    assert metrics["mismatch/correction_mean"] == pytest.approx(mean, rel=1e-5)
    assert metrics["mismatch/correction_clipped"] == pytest.approx(clipped)


def test_the_product_of_a_long_sequence_is_bounded():
    settings = GrpoSettings(
        importance_correction="truncate", importance_level="sequence", importance_max=1e30
    )
    value, _, _ = of_samples(settings, np.zeros((1, 3)), [3], [1.0], np.full((1, 3), -50.0))
    assert value == pytest.approx(-3 * float(np.exp(20.0)), rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.4, 0.3, 0.2, 0.1]),
        ("cosine", [0.4, 0.2 * (1 + 0.5**0.5), 0.2, 0.2 * (1 - 0.5**0.5)]),
    ],
)
def test_the_kl_decays_to_zero_at_the_end_of_the_stage(schedule, expected):
    settings = GrpoSettings(steps=4, kl_coef=0.4, kl_schedule=schedule)
    found = [scheduled_kl_coef(settings, step) for step in range(5)]
    np.testing.assert_allclose(found, [*expected, 0.0], rtol=1e-6, atol=1e-9)
    assert scheduled_kl_coef(replace(settings, kl_schedule="constant"), 1) is None


def test_the_batchs_kl_coef_takes_the_place_of_the_configs(mixed_batch):
    settings, logprob = GrpoSettings(kl_coef=0.5), jnp.asarray(mixed_batch.old_logprobs)
    scheduled = replace(mixed_batch, kl_coef=np.float32(0.125))
    found = [grpo_loss(settings, b, logprob, logprob)[1] for b in (mixed_batch, scheduled)]
    assert float(found[1]["loss/kl"]) == pytest.approx(float(found[0]["loss/kl"]) / 4, rel=1e-6)
    assert float(found[1]["loss/policy"]) == float(found[0]["loss/policy"])


def test_kl_without_a_reference_is_refused(mixed_batch):
    batch = replace(mixed_batch, reference_logprobs=None)
    with pytest.raises(UserError, match=r"grpo\.kl_coef=0\.01 needs .* or set"):
        GrpoLoss(None, None, GrpoSettings())(None, batch)
