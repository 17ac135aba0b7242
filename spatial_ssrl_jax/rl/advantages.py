"""The advantage of a sample: how its reward compares within its group."""

import numpy as np


def group_advantage(reward_BG: np.ndarray, scale_rewards: bool = True) -> np.ndarray:
    """(r - mean) / (std + 1e-6) in each group, the standard deviation with G - 1 (GRPO, arXiv
    2402.03300).

    Args:
      reward_BG: [B, G] float rewards.
      scale_rewards: False leaves the division out.

    Returns:
      [B, G] float32; zero throughout a group whose rewards do not vary.
    """
    reward = reward_BG.astype(np.float64)
    advantage = reward - reward.mean(axis=1, keepdims=True)
    if scale_rewards:
        advantage /= reward.std(axis=1, ddof=1, keepdims=True) + 1e-6
    advantage[reward.max(axis=1) == reward.min(axis=1)] = 0.0
    return advantage.astype(np.float32)
