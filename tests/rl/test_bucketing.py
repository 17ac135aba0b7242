"""Batches of like length: every prompt once, in the smallest bucket that holds its batch."""

import numpy as np
import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.rl.bucketing import BatchShape, Buckets, bucket_by_length

BUCKETS = Buckets(tuple(BatchShape(*size) for size in ((10, 8), (20, 8), (40, 16))))


def test_hand_worked_batches():
    sizes = np.array([[30, 12], [9, 4], [19, 8], [4, 0], [12, 9], [10, 8]])
    batches = bucket_by_length(sizes, 2, BUCKETS)
    assert [batch.rows.tolist() for batch in batches] == [[3, 1], [5, 4], [2, 0]]
    shapes = [BatchShape(10, 8), BatchShape(40, 16), BatchShape(40, 16)]
    assert [batch.shape for batch in batches] == shapes


def test_every_prompt_is_in_one_batch_that_holds_it():
    rng = np.random.default_rng(0)
    sizes = np.column_stack([rng.integers(1, n + 1, 48) for n in (40, 16)])
    batches = bucket_by_length(sizes, 4, BUCKETS)
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(48))
    for batch in batches:
        assert (sizes[batch.rows] <= (batch.shape.tokens, batch.shape.patches)).all()


def test_shapes_are_agreed_between_processes(monkeypatch: pytest.MonkeyPatch):
    """Another process whose prompts are longer decides the shape."""
    other = np.array([[[15, 1], [36, 1]]])
    monkeypatch.setattr(
        "spatial_ssrl_jax.rl.bucketing.all_gather", lambda mine: np.concatenate((mine, other))
    )
    batches = bucket_by_length(np.array([[7, 8], [6, 1]]), 1, BUCKETS)
    assert [batch.rows.tolist() for batch in batches] == [[1], [0]]
    assert [batch.shape for batch in batches] == [BatchShape(20, 8), BatchShape(40, 16)]


def test_a_prompt_above_all_buckets_is_named():
    with pytest.raises(
        UserError,
        match=r"prompt of 41 tokens with 1 patches \(there are 10 with 8, .*data\.prompt_buckets",
    ):
        bucket_by_length(np.array([[41, 1]]), 1, BUCKETS)
