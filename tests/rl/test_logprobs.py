"""One model for sampling and training: both give a token the same log-probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.rl.logprobs import logprobs_of
from spatial_ssrl_jax.rollout.engine import Engine
from spatial_ssrl_jax.rollout.sampling import Sampling
from tests.helpers.groups import pack_groups, unpack

LIMIT, GROUP, TEMPERATURE = 24, 3, 0.8
STOPS = tuple(range(0, 680, 17))


def mismatch(toy, params, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """|sampler - trainer| and the sampler's log-probabilities, of all tokens that were sampled."""
    grids = ([(1, 4, 6), (1, 2, 10)], [], [(1, 6, 2)], [(1, 10, 4)])
    prompts = [toy.prompt(i, 8 + i, g) for i, g in enumerate(grids)]
    compute = Compute(dtype, attention_chunk=16, vocab_block=32)
    engine = Engine(toy.config, compute, STOPS, kv_block=12, check_every=4)
    rollout = engine.generate(
        params,
        engine.fill(params),
        [pad_prompts(prompts, 32, 100)],
        group_size=GROUP,
        max_new_tokens=LIMIT,
        key=jax.random.key(5),
        prompt_index=[np.arange(4)],
        sampling=Sampling(TEMPERATURE),
    )
    rows, places = pack_groups(
        toy.config, prompts, rollout.tokens, rollout.length, [[0, 3], [2, 1]]
    )
    packed = logprobs_of(toy.config, compute, TEMPERATURE, params, rows)
    found = unpack(places, packed, rollout.tokens.shape)
    held = np.arange(LIMIT) < rollout.length[..., None]
    assert held.sum() > 100 and rollout.finished.any() and not rollout.finished.all()
    return np.abs(found - rollout.logprobs)[held], rollout.logprobs[held]


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_the_trainer_agrees_with_the_sampler(toy, dtype: str, limit: float):
    gap, _ = mismatch(toy, toy.params, dtype)
    print(f"measured mismatch in {dtype}: max {gap.max():.1e}, mean {gap.mean():.1e}")
    assert gap.max() < limit and gap.mean() < limit / 4


def test_they_agree_before_vision_tokens_are_suppressed(toy):
    """Vision tokens take most of the probability and are never drawn; both sides count them."""
    head = np.array(toy.params["text"]["head"])
    row = 30 * np.random.default_rng(0).normal(size=head.shape[1])
    head[toy.config.image_token_id], head[toy.config.video_token_id] = row, -row
    params = {**toy.params, "text": {**toy.params["text"], "head": jnp.asarray(head)}}
    gap, logprobs = mismatch(toy, params, "float32")
    assert np.median(logprobs) < -20, "the vision tokens were not ahead"
    assert gap.max() < 1e-4 * np.abs(logprobs).max()
