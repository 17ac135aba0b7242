"""What a step need not compute: it changes no number of the update."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from spatial_ssrl_jax.config.schema import GrpoSettings
from spatial_ssrl_jax.qwen_vl.inputs import VisionFeatures, VisionInput
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings
from spatial_ssrl_jax.qwen_vl.model import init_adapters
from spatial_ssrl_jax.qwen_vl.param_tree import merge_params
from spatial_ssrl_jax.rl import advantages
from spatial_ssrl_jax.rl import grpo as module
from spatial_ssrl_jax.rl.advantages import groups_to_update
from spatial_ssrl_jax.rl.grpo import Grpo
from spatial_ssrl_jax.rl.logprobs import logprobs_of
from spatial_ssrl_jax.rl.train_step import initial_train_state, micro_gradients, train_step
from spatial_ssrl_jax.rl.trainable import Trainable
from tests.rl.conftest import CONFIG, SETTINGS, make_grpo

OPTIMIZER = optax.adamw(1e-2, weight_decay=0.1)


def stage(settings: GrpoSettings) -> Grpo:
    return make_grpo(settings)


def after(grpo: Grpo, params, updates) -> tuple[dict, list[dict]]:
    """What the updates leave, as arrays: the state, and the metrics of each."""
    params = jax.device_put(jax.tree.map(lambda x: x + 0, params), grpo.layout.replicated())
    state, found = initial_train_state(OPTIMIZER, params), []
    for update in updates:
        state, metrics = train_step(grpo.loss, OPTIMIZER, state, update)
        found.append(jax.device_get(metrics))
    return jax.device_get(state), found


def assert_equal(found, expected) -> None:
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_first_update_needs_no_old_logprobs(small_params, grpo_step):
    """It has the current ones: loss, gradients, metrics and weights as with those computed."""
    reference = jax.tree.map(lambda x: 1.1 * x, small_params)
    settings = replace(
        SETTINGS,
        minibatches_per_rollout=3,
        kl_coef=0.1,
        importance_correction="truncate",
        importance_max=1.05,
    )
    grpo = replace(stage(settings), reference=reference)
    updates, _ = grpo.micro_batches(small_params, *grpo_step)
    programs = micro_gradients._cache_size()
    found = after(grpo, small_params, updates)
    assert micro_gradients._cache_size() == programs + 1  # one for all updates

    def computed(batch):
        loss = grpo.loss
        old = logprobs_of(loss.config, loss.compute, settings.temperature, small_params, batch.rows)
        return replace(batch, old_logprobs=old, first_update=None)

    expected = after(grpo, small_params, [[computed(b) for b in update] for update in updates])
    assert_equal(found, expected)
    ratios = [metrics["policy/ratio_mean"] for metrics in found[1]]
    assert ratios[0] == 1 and ratios[1] != 1 and ratios[2] != 1


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch):
    """Makes updates that compute all groups."""

    def updates(grpo: Grpo, params, step):
        with monkeypatch.context() as patch:
            patch.setattr(module, "groups_to_update", lambda w, *_: np.ones(len(w), bool))
            return grpo.micro_batches(params, *step)[0]

    return updates


def test_groups_without_gradient_are_left_out(small_params, grpo_step, everything):
    """One of three groups has no variance. Metrics are over the others, the rest is equal."""
    grpo = stage(SETTINGS)
    (update,), updated = grpo.micro_batches(small_params, *grpo_step)
    assert updated.groups.tolist() == [True, False, True] and len(update) == 2
    state, (metrics,) = after(grpo, small_params, [update])
    whole = everything(grpo, small_params, grpo_step)
    assert len(whole[0]) == 3
    expected, (all_metrics,) = after(grpo, small_params, whole)
    assert_equal(state, expected)
    for name in ("loss/total", "loss/policy", "optim/gradient_norm"):
        assert metrics[name] == all_metrics[name], name
    length = grpo_step[1].rollout.length
    kept = [batch for batch in whole[0] if np.asarray(batch.advantage).any()]
    parts = [micro_gradients(grpo.loss, small_params, {}, batch) for batch in kept]
    entropy = sum(float(sums["policy/entropy"]) for _, sums in parts) * length.sum()
    assert metrics["policy/entropy"] == pytest.approx(entropy / length[[0, 2]].sum(), rel=1e-5)
    assert metrics["policy/entropy"] != pytest.approx(all_metrics["policy/entropy"], rel=1e-4)
    assert metrics["policy/ratio_mean"] == pytest.approx(1, rel=1e-6)


def test_an_update_without_any_gradient_is_computed(small_params, grpo_step):
    """Weights decay; metrics are over all groups."""
    batch, scored = grpo_step
    flat = replace(scored, advantage=np.zeros_like(scored.advantage))
    grpo = stage(SETTINGS)
    (update,), updated = grpo.micro_batches(small_params, batch, flat)
    assert updated.groups.all() and len(update) == 3
    state, (metrics,) = after(grpo, small_params, [update])
    assert metrics["optim/gradient_norm"] == 0 and metrics["policy/entropy"] > 0
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(small_params), strict=True):
        np.testing.assert_allclose(new, (1 - 1e-2 * 0.1) * old, rtol=1e-5)


def test_a_step_says_which_groups_it_updates(
    small_params, grpo_step, monkeypatch: pytest.MonkeyPatch
):
    """MFU and the fraction of padding count the others as sampled alone."""
    batch, scored = grpo_step
    monkeypatch.setattr(Grpo, "sample", lambda *_: scored.rollout)
    monkeypatch.setattr(Grpo, "_score", lambda *_: scored)
    monkeypatch.setattr(
        module, "train_step", lambda _loss, _optimizer, state, _batches: (state, {})
    )
    monkeypatch.setattr(module, "rollout_rows", lambda *_: {"length": scored.rollout.length})
    monkeypatch.setattr(module, "rollout_metrics", lambda _: {})
    grpo, state = stage(SETTINGS), SimpleNamespace(params=small_params)
    _, metrics, _, found = grpo.step(state, batch, jax.random.key(0), pytest.fail)
    assert found.updated.tolist() == [True, False, True]
    tokens = sum(len(batch.prompts[b].ids) + scored.rollout.length[b].sum() for b in (0, 2))
    assert metrics["perf/update_padding_share"] == pytest.approx(1 - tokens / (2 * 72))


def test_which_groups_have_a_gradient(monkeypatch: pytest.MonkeyPatch):
    weight = np.array([[1, 1], [1, 1], [0, 0], [0, 1], [1, 0]], np.float32)
    advantage = np.array([[1, -1], [0, 0], [1, -1], [1, 0], [1, 0]], np.float32)
    assert groups_to_update(weight, advantage, False).tolist() == [True, False, False, False, True]
    assert groups_to_update(weight, advantage, True).tolist() == [True, True, False, True, True]
    assert groups_to_update(weight[1:4], advantage[1:4], False).all()  # none has one
    monkeypatch.setattr(advantages, "all_sum", lambda count: count + 1)  # another process's has
    assert not groups_to_update(weight[1:4], advantage[1:4], False).any()


@pytest.mark.parametrize(
    ("changes", "width"),
    [({"freeze": ("vision",)}, 4 * 32), ({"lora": LoraSettings(2)}, 32)],
    ids=["the merger trains", "adapters train"],
)
def test_images_are_encoded_once(
    small_params, grpo_step, monkeypatch: pytest.MonkeyPatch, changes: dict, width: int
):
    """The update is the same bit for bit; the pixels leave the device."""
    settings = replace(SETTINGS, kl_coef=0.1, micro_batch_rows=3, **changes)
    adapters = init_adapters(CONFIG, settings.lora, jax.random.key(0))
    params = merge_params(small_params, jax.tree.map(lambda x: x + 0.1, adapters))
    trained, frozen = Trainable.of(settings).split(params, "float32")
    reference = small_params | {"text": jax.tree.map(lambda x: 1.1 * x, small_params["text"])}
    grpo = replace(stage(settings), reference=reference)

    def step():
        ((batch,),), _ = grpo.micro_batches(params, *grpo_step)
        gradients, sums = micro_gradients(grpo.loss, trained, frozen, batch)
        return batch.rows.vision, (batch.reference_logprobs, gradients, sums)

    features, found = step()
    assert isinstance(features, VisionFeatures) and features.tokens.shape == (3, 48, width)
    monkeypatch.setattr(GrpoSettings, "reuses_vision", False)
    pixels, expected = step()
    assert isinstance(pixels, VisionInput)
    assert_equal(found, expected)
    assert all(np.any(x) for x in jax.tree.leaves(found[1]))


def test_when_images_are_encoded_once(small_params, mixed_batch):
    frozen = replace(SETTINGS, freeze=("vision",))
    assert not frozen.reuses_vision  # the update alone needs them
    assert replace(frozen, kl_coef=0.1).reuses_vision
    assert replace(frozen, minibatches_per_rollout=3).reuses_vision
    assert not replace(SETTINGS, kl_coef=0.1, freeze=("merger",)).reuses_vision
    vision = jax.tree.map(lambda x: x[:, :0], mixed_batch.rows.vision)
    batch = replace(mixed_batch, rows=replace(mixed_batch.rows, vision=vision))
    grpo = stage(replace(frozen, kl_coef=0.1))
    assert grpo._with_features(small_params, batch) is batch  # no images at all


def test_a_process_without_groups_has_rows_of_padding(small_params, grpo_step, monkeypatch):
    """Where another process has some: its micro-batches are computed, and add nothing."""
    monkeypatch.setattr(module, "groups_to_update", lambda weight, *_: np.zeros(len(weight), bool))
    (update,), updated = stage(SETTINGS).micro_batches(small_params, *grpo_step)
    (micro,) = update
    assert not updated.groups.any() and (np.asarray(micro.rows.place) == -1).all()
    gradients, sums = micro_gradients(stage(SETTINGS).loss, small_params, {}, micro)
    assert all(not np.any(x) for x in jax.tree.leaves(gradients))
    assert all(float(value) == 0 for value in sums.values())
