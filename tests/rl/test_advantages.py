"""Advantages against numbers worked by hand."""

import numpy as np
import pytest

from spatial_ssrl_jax.rl.advantages import group_advantage


def test_by_hand():
    # mean 0.4, deviations (.6, -.4, -.4, .6, -.4), sum of squares 1.2, / (5 - 1) = 0.3
    reward = np.array([[1.0, 0.0, 0.0, 1.0, 0.0]])
    std = 0.3**0.5
    expected = np.array([[0.6, -0.4, -0.4, 0.6, -0.4]]) / (std + 1e-6)
    np.testing.assert_allclose(group_advantage(reward), expected, rtol=1e-6)
    plain = group_advantage(reward, scale_rewards=False)
    np.testing.assert_allclose(plain, expected * (std + 1e-6), rtol=1e-6)


def test_leave_one_out_by_hand():
    # others' means: of 1.0 (0 + .4 + .2) / 3 = .2, of 0.0 1.6 / 3, of 0.4 1.2 / 3, of 0.2 1.4 / 3
    reward = np.array([[1.0, 0.0, 0.4, 0.2]])
    expected = [[0.8, -1.6 / 3, 0.0, -0.8 / 3]]
    found = group_advantage(reward, "rloo", scale_rewards=False)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert not group_advantage(np.full((2, 7), 0.1), "rloo", scale_rewards=False).any()


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_equal_rewards_give_zero(value):
    assert not group_advantage(np.full((2, 7), value)).any()


def test_groups_are_apart():
    two = np.array([[0.0, 1.0, 0.1], [1.0, 1.0, 0.0]])
    alone = np.concatenate([group_advantage(two[:1]), group_advantage(two[1:])])
    np.testing.assert_array_equal(group_advantage(two), alone)
