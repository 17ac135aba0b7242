"""Pieces of like length: every prompt once, in the smallest bucket that holds its piece."""

from dataclasses import replace

import numpy as np
import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config, GrpoSettings, RolloutSettings
from spatial_ssrl_jax.rl.bucketing import BatchShape, Buckets, bucket_by_length

BUCKETS = Buckets((10, 20, 40), (0, 2, 4), (8, 16, 32))


def test_hand_worked_pieces():
    """Two prompts of the smallest bucket come first; in it the one with short responses does."""
    sizes = np.array([[30, 3, 5], [9, 1, 9], [19, 2, 20], [4, 0, 8], [12, 4, 1], [10, 2, 30]])
    pieces = bucket_by_length(sizes, 2, BUCKETS)
    assert [piece.rows.tolist() for piece in pieces] == [[3, 1], [5, 4], [2, 0]]
    assert [piece.shape for piece in pieces] == [
        BatchShape(10, 2, 16), BatchShape(20, 4, 32), BatchShape(40, 4, 32)
    ]  # fmt: skip
    assert [piece.padded_tokens(3) for piece in pieces] == [
        2 * (10 + 48),
        2 * (20 + 96),
        2 * (40 + 96),
    ]


def test_every_prompt_is_in_one_piece_that_holds_it():
    rng = np.random.default_rng(0)
    sizes = np.column_stack([rng.integers(1, n + 1, 48) for n in (40, 4, 32)])
    pieces = bucket_by_length(sizes, 4, BUCKETS)
    assert sorted(np.concatenate([piece.rows for piece in pieces])) == list(range(48))
    for piece in pieces:
        shape = (piece.shape.tokens, piece.shape.windows, piece.shape.response)
        assert (sizes[piece.rows] <= shape).all()


def test_shapes_are_agreed_between_processes(monkeypatch: pytest.MonkeyPatch):
    """Another process whose prompts are longer decides the shape."""
    other = np.array([[[35, 1, 1], [36, 1, 1]]])
    monkeypatch.setattr(
        "spatial_ssrl_jax.rl.bucketing.all_gather", lambda mine: np.concatenate((mine, other))
    )
    pieces = bucket_by_length(np.array([[5, 4, 9], [6, 1, 1]]), 1, BUCKETS)
    assert [piece.rows.tolist() for piece in pieces] == [[1], [0]]
    assert [piece.shape for piece in pieces] == [BatchShape(40, 2, 8), BatchShape(40, 4, 16)]


def test_without_responses_there_is_no_width():
    assert bucket_by_length(np.array([[5, 1, 0]]), 1, BUCKETS)[0].shape == BatchShape(10, 2, 0)


@pytest.mark.parametrize(
    ("named", "limit", "widths"),
    [
        ((), 40, (16, 32, 40)),
        ((), 32, (16, 32)),
        ((), 8, (8,)),
        ((24, 4), 40, (4, 24, 40)),
        ((24, 64), 40, (24, 40)),
    ],
)
def test_widths_of_responses(named, limit, widths):
    config = replace(
        Config("x"),
        grpo=GrpoSettings(response_buckets=named),
        rollout=RolloutSettings(max_new_tokens=limit, kv_block=16),
    )
    assert Buckets.of(config).response == widths


def test_a_prompt_above_all_buckets_is_named():
    with pytest.raises(UserError, match=r"data\.prompt_buckets=.* no bucket for 41"):
        bucket_by_length(np.array([[41, 1, 1]]), 1, BUCKETS)
