"""Weights of samples, worked by hand."""

import numpy as np
import pytest

from spatial_ssrl_jax.rl.losses import sample_weights

LENGTH = np.array([[2, 6], [8, 4]], np.int32)
ALL = np.ones((2, 2), bool)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token", [[1 / 20, 1 / 20], [1 / 20, 1 / 20]]),
        ("sequence", [[1 / 8, 1 / 24], [1 / 32, 1 / 16]]),
        ("dr_grpo", [[1 / 40, 1 / 40], [1 / 40, 1 / 40]]),
    ],
)
def test_weights(aggregation, expected):
    found = sample_weights(LENGTH, ALL, aggregation, max_new_tokens=10)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "dr_grpo"])
def test_samples_left_out_weigh_nothing_and_are_not_averaged_over(aggregation):
    counted = np.array([[True, False], [True, True]])
    found = sample_weights(LENGTH, counted, aggregation, max_new_tokens=10)
    alone = sample_weights(
        LENGTH[counted][None], np.ones((1, 3), bool), aggregation, max_new_tokens=10
    )
    assert found[0, 1] == 0
    np.testing.assert_array_equal(found[counted], alone[0])
    if aggregation != "dr_grpo":
        assert (found * LENGTH).sum() == pytest.approx(1, rel=1e-6)


def test_nothing_counted_gives_zeros():
    assert not sample_weights(LENGTH, ~ALL, "token", max_new_tokens=10).any()
