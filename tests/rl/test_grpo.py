"""A step's rollout batches and micro-batches: how they are made changes no token or gradient."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.data.packing import Content, RowShape
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.rl.bucketing import BatchShape, Buckets
from spatial_ssrl_jax.rollout.engine import Engine
from spatial_ssrl_jax.rollout.sampling import Sampling
from tests.rl.conftest import CONFIG, ROW, SETTINGS, batch_of, make_grpo
from tests.rl.test_exactness import assert_close

STOPS = tuple(range(0, 680, 5))  # a fifth of what is drawn ends a response


BY_SEQUENCE = replace(
    SETTINGS, policy_loss="gspo", importance_correction="truncate", importance_level="sequence"
)


# The two groups that vary are together in a row, or each in one of its own shape.
TOGETHER = (RowShape(Content(110, 160, 40), 8),)
APART = (RowShape(Content(34, 100, 16), 8), ROW)


@pytest.mark.parametrize("settings", [SETTINGS, BY_SEQUENCE], ids=["tokens", "sequences"])
@pytest.mark.parametrize("shapes", [TOGETHER, APART], ids=["together", "apart"])
def test_micro_batches_have_the_gradient_of_the_whole(
    small_params, mixed, grpo_step, settings, shapes
):
    """Without the group that does not vary."""
    grpo = make_grpo(settings, shapes)
    (micro,), updated = grpo.micro_batches(small_params, *grpo_step)
    found = [m.rows.ids.shape for m in micro]
    assert found == [(1, shape.capacity.tokens) for shape in shapes]
    padded = sum(tokens for _, tokens in found)
    assert updated.padded_tokens == padded
    batch, scored = grpo_step
    tokens = sum(len(batch.prompts[b].ids) + scored.rollout.length[b].sum() for b in (0, 2))
    assert updated.padding_share(batch, scored.rollout) == pytest.approx(1 - tokens / padded)
    gradient = jax.jit(jax.grad(lambda p, b: grpo.loss(p, b)[0]))
    parts = [gradient(small_params, m) for m in micro]
    weight = np.full((3, 4), 1 / mixed.length.sum(), np.float32)
    whole = replace(
        replace(mixed, weight=weight).packed(CONFIG, [[0], [1], [2]]),
        old_logprobs=None,
        reference_logprobs=None,
    )
    assert_close(jax.tree.map(lambda *x: sum(x), *parts), gradient(small_params, whole), 1e-5)


def test_prompts_stay_in_their_update(small_params, mixed, grpo_step):
    """Whatever their lengths: an update's prompts follow from the step alone."""
    settings = replace(SETTINGS, minibatches_per_rollout=3, kl_coef=0.1, old_logprobs="sampler")
    grpo = make_grpo(settings)
    updates, _ = grpo.micro_batches(small_params, *grpo_step)
    for number, ((micro,), prompt) in enumerate(zip(updates, mixed.prompts, strict=True)):
        rows, tokens = micro.rows, mixed.length[number].sum()
        np.testing.assert_array_equal(rows.ids[0, : len(prompt.ids)], prompt.ids)
        held = np.asarray(rows.place[0]) >= 0
        labels = mixed.tokens[number][mixed.held[number]]
        np.testing.assert_array_equal(np.asarray(rows.label[0])[held], labels)
        assert float(micro.normaliser) == tokens == held.sum()
        np.testing.assert_allclose(np.asarray(micro.weight[0])[held], 1 / tokens, rtol=1e-6)
        assert not np.asarray(micro.weight[0])[~held].any()


def test_rollout_batches_of_like_length_draw_the_same_tokens(toy):
    prompts = [
        toy.prompt(0, 9, [(1, 10, 4)]), toy.prompt(1, 7), toy.prompt(2, 6, [(1, 6, 6)]),
        toy.prompt(3, 8),
    ]  # fmt: skip
    batch = batch_of(prompts, [4, 2, 9, 7])
    engine = Engine(toy.config, Compute(attention_chunk=16), STOPS, 4, 4)
    settings = replace(SETTINGS, group_size=3)
    grpo = make_grpo(
        settings, buckets=Buckets((BatchShape(8, 0), BatchShape(32, 100))), engine=engine
    )
    key, seen = jax.random.key(3), []

    class Watched:
        fill, shards = engine.fill, engine.shards

        @staticmethod
        def generate_batches(params, weights, batches, **settings):
            batches = [replace(batch, prompts=list(batch.prompts)) for batch in batches]
            for batch in batches:
                seen.append([(*p.ids.shape, p.vision.frame.shape[1]) for p in batch.prompts])
            assert settings["longest_prompt"] == 32
            return engine.generate_batches(params, weights, batches, **settings)

    found = replace(grpo, engine=Watched).sample(toy.params, batch, key)
    assert seen == [[(2, 8, 0)], [(2, 32, 100)]]
    whole = engine.generate(
        toy.params,
        engine.fill(toy.params),
        [pad_prompts(batch.prompts, 32, 100)],
        group_size=3,
        max_new_tokens=8,
        key=key,
        prompt_index=[batch.index],
        sampling=Sampling(SETTINGS.temperature),
    )
    assert len(np.unique(whole.length)) > 2
    for name in ("tokens", "length", "finished"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    np.testing.assert_allclose(found.logprobs, whole.logprobs, atol=1e-4)
