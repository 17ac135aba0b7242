"""The advantage of a sample: how its reward compares within its group."""

import numpy as np

from spatial_ssrl_jax.config.schema import AdvantageEstimator
from spatial_ssrl_jax.parallel.collectives import all_sum


def group_advantage(
    reward_BG: np.ndarray, estimator: AdvantageEstimator = "grpo", scale_rewards: bool = True
) -> np.ndarray:
    """The advantage of each sample of each group.

    - `grpo`: (r - mean) / (std + 1e-6), the standard deviation with G - 1 (arXiv 2402.03300);
    - `rloo`: r - mean of the other G - 1 samples, which is not biased by r (arXiv 2402.14740).

    Args:
      reward_BG: [B, G] float rewards.
      estimator: which of them.
      scale_rewards: False leaves the division out, as for `rloo` it must be.

    Returns:
      [B, G] float32; zero throughout a group whose rewards do not vary.
    """
    reward = reward_BG.astype(np.float64)
    if estimator == "rloo":
        others = reward.sum(axis=1, keepdims=True) - reward
        advantage = reward - others / (reward.shape[1] - 1)
    else:
        advantage = reward - reward.mean(axis=1, keepdims=True)
    if scale_rewards:
        advantage /= reward.std(axis=1, ddof=1, keepdims=True) + 1e-6
    advantage[reward.max(axis=1) == reward.min(axis=1)] = 0.0
    return advantage.astype(np.float32)


def groups_to_update(weight_BG: np.ndarray, advantage_BG: np.ndarray, has_kl: bool) -> np.ndarray:
    """The groups that an update has to compute: those that may have a gradient.

    A sample has none where it weighs nothing, or, without KL, where its advantage is zero. Where no
    group of any process has one, all are computed, so that the update has metrics.

    Args:
      weight_BG: float32 weight of each token of a sample, this process's rows of the update.
      advantage_BG: float32.
      has_kl: whether the loss has a KL term.

    Returns:
      [B] bool.
    """
    found = ((weight_BG != 0) & ((advantage_BG != 0) | has_kl)).any(axis=1)
    return found if all_sum(found.sum()) else np.ones_like(found)
