"""Groups without variance give way to others, in order and as far as they are found."""

from dataclasses import fields

import numpy as np
import pytest

from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.rl.resampling import resample_groups, zero_variance_groups
from spatial_ssrl_jax.rl.rewards import Reward
from spatial_ssrl_jax.rl.step_metrics import ScoredRollout
from spatial_ssrl_jax.rollout.engine import Rollout
from tests.rl.conftest import make_prompt

RIGHT, WRONG = Reward(1.0, 1.0, 1.0), Reward(0.1, 0.0, 1.0)
NO_FORM = Reward(0.0, 0.0, 0.0)
VARIED, FLAT, FORM_ONLY = (RIGHT, WRONG), (WRONG, WRONG), (WRONG, NO_FORM)


def groups(kinds: list, first: int) -> tuple[Batch, ScoredRollout]:
    """Groups of two whose every part tells which they are: numbers `first`, `first + 1`, …"""
    numbers = np.arange(first, first + len(kinds))
    prompts = [make_prompt(np.random.default_rng(int(n)), 5, []) for n in numbers]
    rows = np.broadcast_to(numbers[:, None], (len(kinds), 2))
    rollout = Rollout(*(np.repeat(rows[..., None], 3, 2) for _ in range(2)), rows.copy(), rows > -1)
    batch = Batch(
        tuple(Item(f"example {n}", p, ()) for n, p in zip(numbers, prompts, strict=True)),
        np.arange(len(kinds), dtype=np.int32),
    )
    texts = [[f"text {n}"] * 2 for n in numbers]
    return batch, ScoredRollout(rollout, texts, list(kinds), rows.astype(np.float32))


def test_flat_is_by_accuracy_alone():
    _, scored = groups([VARIED, FLAT, FORM_ONLY, (RIGHT, RIGHT)], 0)
    assert zero_variance_groups(scored).tolist() == [False, True, True, True]


def test_groups_are_replaced_in_order():
    """In round 1 one group varies, in round 2 more than there are places left."""
    start = groups([FLAT, VARIED, FORM_ONLY, FLAT], 0)
    rounds = {
        1: groups([FLAT, FLAT, VARIED, FLAT], 10),
        2: groups([VARIED, VARIED, VARIED, VARIED], 20),
    }
    asked = []

    def draw(number: int):
        asked.append(number)
        return rounds[number]

    batch, scored, sampled = resample_groups(*start, draw, rounds=5)
    assert asked == [1, 2] and sampled == 8
    numbers = [12, 1, 20, 21]
    assert [item.example for item in batch.items] == [f"example {n}" for n in numbers]
    assert [group[0] for group in scored.texts] == [f"text {n}" for n in numbers]
    for field in fields(Rollout)[:3]:
        found = getattr(scored.rollout, field.name)
        assert found.reshape(4, -1)[:, 0].tolist() == numbers
    assert scored.advantage[:, 0].tolist() == numbers
    for row, number in enumerate(numbers):
        ids = make_prompt(np.random.default_rng(number), 5, []).ids
        assert batch.prompts[row].ids.tolist() == ids.tolist()
    assert batch.index.tolist() == [0, 1, 2, 3]


def test_what_is_not_found_stays_flat():
    start = groups([FLAT, VARIED], 0)
    batch, scored, sampled = resample_groups(*start, lambda _: groups([FLAT, FLAT], 10), rounds=2)
    assert sampled == 4 and zero_variance_groups(scored).tolist() == [True, False]
    assert [item.example for item in batch.items] == ["example 0", "example 1"]


def test_nothing_is_drawn_where_all_vary():
    start = groups([VARIED, VARIED], 0)
    assert resample_groups(*start, lambda _: pytest.fail("drawn"), rounds=2)[2] == 0
