"""Groups without variance give way to others, in order and as far as they are found."""

from dataclasses import fields, replace

import numpy as np
import pytest

from spatial_ssrl_jax.config.schema import GrpoSettings
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.rl.resampling import filtered_groups, resample_groups
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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [False, True, True, True]),  # without variance in accuracy
        ({"filter_key": "overall"}, [False, True, False, True]),
        ({"filter_low": 0.4, "filter_high": 0.6}, [False, True, True, True]),
        ({"filter_low": 0.5}, [True] * 4),  # the mean accuracy of the first is 0.5: not above
        ({"filter_high": 0.5}, [True] * 4),
        ({"filter_key": "overall", "filter_high": 0.5}, [True, True, False, True]),  # 0.55, 0.05
        ({"filter_key": "overall", "filter_low": 0.06}, [False, True, True, True]),
    ],
)
def test_which_groups_are_left_out(changes: dict, expected: list[bool]):
    _, scored = groups([VARIED, FLAT, FORM_ONLY, (RIGHT, RIGHT)], 0)
    assert filtered_groups(GrpoSettings(**changes), scored).tolist() == expected


@pytest.mark.parametrize("rewards", [(5.0, -1.0), (1.0, -3.0)])
def test_0_and_1_limit_no_reward_of_another_range(rewards: tuple[float, float]):
    _, scored = groups([tuple(Reward(r, 0.0, 0.0) for r in rewards)], 0)
    settings = GrpoSettings(filter_key="overall")
    assert filtered_groups(settings, scored).tolist() == [False]
    for changes in ({"filter_low": 2.5}, {"filter_high": -1.5}):
        assert filtered_groups(replace(settings, **changes), scored).tolist() == [True]


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

    batch, scored, sampled = resample_groups(*start, draw, GrpoSettings(max_resamples=5))
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
    settings = GrpoSettings(max_resamples=2)
    batch, scored, sampled = resample_groups(*start, lambda _: groups([FLAT, FLAT], 10), settings)
    assert sampled == 4 and filtered_groups(settings, scored).tolist() == [True, False]
    assert [item.example for item in batch.items] == ["example 0", "example 1"]


def test_nothing_is_drawn_where_all_vary():
    start = groups([VARIED, VARIED], 0)
    settings = GrpoSettings(max_resamples=2)
    assert resample_groups(*start, lambda _: pytest.fail("drawn"), settings)[2] == 0


def test_groups_outside_the_range_are_replaced():
    """One of four is right: 0.25, which is too hard; a group with one of two right is drawn."""
    hard, fair = (RIGHT, WRONG, WRONG, WRONG), (RIGHT, WRONG, RIGHT, WRONG)
    settings = GrpoSettings(max_resamples=1, filter_low=0.3)
    batch, _, sampled = resample_groups(
        *groups([fair, hard], 0), lambda _: groups([hard, fair], 10), settings
    )
    assert sampled == 2
    assert [item.example for item in batch.items] == ["example 0", "example 11"]
