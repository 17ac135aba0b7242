"""Every setting of GRPO's update, against its formula in a few lines of NumPy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.config.schema import GrpoSettings
from spatial_ssrl_jax.rl.logprobs import logprobs_of
from spatial_ssrl_jax.rl.losses import grpo_loss
from spatial_ssrl_jax.rl.rewards import Reward
from tests.helpers.groups import Sampled
from tests.rl.conftest import CONFIG, SETTINGS, make_grpo

LOGPROB = np.random.default_rng(7).normal(-4.5, 0.4, (3, 4, 8)).astype(np.float32)


def by_hand(s: GrpoSettings, batch: Sampled, logprob: np.ndarray) -> float:
    """The loss as the papers that `grpo_loss` names state it, in float64."""
    x = {
        name: np.asarray(getattr(batch, name), np.float64)
        for name in ("sampled_logprobs", "old_logprobs", "reference_logprobs", "weight")
    }
    mask = np.arange(8) < batch.length[..., None]
    advantage = np.broadcast_to(np.asarray(batch.advantage)[..., None], mask.shape)
    old = x["sampled_logprobs"] if s.old_logprobs == "sampler" else x["old_logprobs"]
    ratio = np.exp(logprob - old)
    if s.policy_loss == "gspo":  # the geometric mean over each sample's own tokens
        for b, g in np.ndindex(batch.length.shape):
            n = int(batch.length[b, g])
            ratio[b, g] = np.prod(ratio[b, g, :n]) ** (1 / n)
    bounded = np.clip(ratio, 1 - s.clip_low, 1 + s.clip_high)
    policy = np.maximum(-advantage * ratio, -advantage * bounded)
    if s.policy_loss == "cispo":
        policy = -advantage * bounded * logprob
    elif s.dual_clip:
        policy = np.where(advantage < 0, np.minimum(policy, -s.dual_clip * advantage), policy)
    correction = np.exp(x["old_logprobs"] - x["sampled_logprobs"])  # trainer over sampler
    if s.importance_level == "sequence":
        correction = np.prod(np.where(mask, correction, 1.0), axis=-1, keepdims=True)
    if s.importance_correction == "truncate":
        policy = policy * np.minimum(correction, s.importance_max)
    elif s.importance_correction == "mask":
        inside = (correction >= 1 / s.importance_max) & (correction <= s.importance_max)
        policy = policy * correction * inside
    d = x["reference_logprobs"] - logprob
    kl = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - d - 1}[s.kl_estimator]
    return float(((policy + s.kl_coef * kl) * mask * x["weight"][..., None]).sum())


CHANGES = [
    {},
    {"clip_low": 0.05},
    {"clip_high": 0.05},
    {"dual_clip": 1.05},
    {"dual_clip": 0.0},
    {"kl_coef": 0.5},
    {"kl_coef": 0.5, "kl_estimator": "k1"},
    {"kl_coef": 0.5, "kl_estimator": "k2"},
    {"old_logprobs": "sampler"},
    {"importance_correction": "truncate", "importance_max": 1.2},
    {"importance_correction": "truncate", "importance_max": 4.0},
    {"importance_correction": "mask", "importance_max": 1.2},
    {"importance_correction": "mask", "importance_max": 1.5},
    {"importance_correction": "truncate", "importance_level": "sequence"},
    {"importance_correction": "mask", "importance_level": "sequence"},
    {"policy_loss": "gspo"},
    {"policy_loss": "gspo", "clip_low": 0.05, "clip_high": 0.05},
    {"policy_loss": "gspo", "importance_correction": "truncate"},
    {"policy_loss": "cispo", "dual_clip": 0.0},
    {"policy_loss": "cispo", "dual_clip": 0.0, "clip_high": 4.0, "clip_low": 1.0},
]


@pytest.mark.parametrize(
    "changes", CHANGES, ids=lambda c: "+".join(map(str, c.values())) or "as is"
)
def test_each_setting_of_the_loss(mixed, changes: dict):
    settings = GrpoSettings(**changes)
    batch, places = mixed.packed_with_places(CONFIG, [[0, 2], [1]])
    logprob = jnp.asarray(places.of_tokens(LOGPROB))
    found = float(grpo_loss(settings, batch, logprob, 0 * logprob)[0])
    assert found == pytest.approx(by_hand(settings, mixed, LOGPROB), rel=1e-4)
    others = [GrpoSettings(**c) for c in CHANGES if c != changes]
    assert all(abs(by_hand(s, mixed, LOGPROB) - found) > 1e-5 for s in others)


def updates_of(params, grpo_step, settings: GrpoSettings):
    grpo = make_grpo(settings)
    return grpo.micro_batches(params, *grpo_step)[0]


def test_old_logprobs_are_those_before_the_updates(small_params, grpo_step):
    """Computed for the updates after the first, unless the sampler's are asked for."""
    several = replace(SETTINGS, minibatches_per_rollout=3)
    for number, update in enumerate(updates_of(small_params, grpo_step, several)):
        (micro,) = update
        assert bool(micro.first_update) == (number == 0)
        if number:
            config, compute = program_of(several)
            expected = logprobs_of(config, compute, several.temperature, small_params, micro.rows)
            np.testing.assert_array_equal(micro.old_logprobs, expected)
    for changes in ({"minibatches_per_rollout": 1}, {"old_logprobs": "sampler"}):
        for update in updates_of(small_params, grpo_step, replace(several, **changes)):
            assert all(micro.old_logprobs is micro.first_update is None for micro in update)


def test_a_kl_coef_that_decays_is_that_of_every_micro_batch(small_params, grpo_step):
    grpo = make_grpo(SETTINGS)
    (update,), _ = grpo.micro_batches(small_params, *grpo_step, np.float32(0.25))
    assert [float(micro.kl_coef) for micro in update] == [0.25] * len(update)
    (update,), _ = grpo.micro_batches(small_params, *grpo_step)
    assert all(micro.kl_coef is None for micro in update)


def test_reference_logprobs_are_the_references(small_params, grpo_step):
    reference = jax.tree.map(lambda x: 1.1 * x, small_params)
    grpo = make_grpo(SETTINGS)
    (update,), _ = replace(grpo, reference=reference).micro_batches(small_params, *grpo_step)
    config, compute = program_of(SETTINGS)
    for micro in update:
        expected = logprobs_of(config, compute, SETTINGS.temperature, reference, micro.rows)
        np.testing.assert_array_equal(micro.reference_logprobs, expected)
    (update,), _ = grpo.micro_batches(small_params, *grpo_step)
    assert all(micro.reference_logprobs is None for micro in update)


def program_of(settings: GrpoSettings):
    loss = make_grpo(settings).loss
    return loss.config, loss.compute


def weights(params, grpo_step, settings: GrpoSettings) -> np.ndarray:
    """[3, 4] of the step's samples; zeros where an update leaves the group out."""
    (update,) = updates_of(params, grpo_step, settings)
    batch, scored = grpo_step
    found = np.zeros(scored.rollout.length.shape)
    for micro in update:
        rows, weight = micro.rows, np.asarray(micro.weight)
        for row, sample in np.ndindex(len(weight), 4 * len(batch.prompts)):
            (mine,) = np.nonzero(np.asarray(rows.sample[row]) == sample)
            if len(mine):
                (value,) = set(weight[row, mine].tolist())  # equal at all of its tokens
                label = np.asarray(rows.label[row])[mine]
                same = (scored.rollout.tokens[..., : len(mine)] == label).all(axis=-1)
                ((b, g),) = np.argwhere(same & (scored.rollout.length == len(mine)))
                found[b, g] = value
    return found


def test_truncated_completions_are_left_out_of_the_loss(small_params, grpo_step):
    _, scored = grpo_step
    length, finished = scored.rollout.length, scored.rollout.finished
    assert finished.any() and not finished.all()
    np.testing.assert_allclose(
        weights(small_params, grpo_step, replace(SETTINGS, kl_coef=0.01)),
        np.full(length.shape, 1 / length.sum()),
    )
    masked = replace(SETTINGS, mask_truncated_completions=True)
    expected = finished / (length * finished).sum()
    np.testing.assert_allclose(weights(small_params, grpo_step, masked), expected, rtol=1e-6)


def test_groups_without_variance_are_left_out_of_the_loss(small_params, grpo_step):
    batch, scored = grpo_step
    right, wrong = Reward(1.0, 1.0, 1.0), Reward(0.1, 0.0, 1.0)
    rewards = [[right, wrong] * 2, [right] * 4, [wrong, right] * 2]
    scored = replace(scored, rewards=rewards)
    varies = np.array([True, False, True])[:, None]
    filtered = replace(SETTINGS, filter_groups=True)
    found = weights(small_params, (batch, scored), filtered)
    length = scored.rollout.length
    np.testing.assert_allclose(
        found, varies * 1.0 / (length * varies).sum() * np.ones(4), rtol=1e-6
    )
