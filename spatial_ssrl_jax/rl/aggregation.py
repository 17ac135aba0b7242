"""How the tokens of an optimizer step are averaged into its loss."""

import numpy as np

from spatial_ssrl_jax.parallel.collectives import all_sum

AGGREGATIONS = ("token", "sequence", "dr_grpo")


def sample_weights(
    length_BG: np.ndarray, counted_BG: np.ndarray, aggregation: str, limit: int
) -> np.ndarray:
    """The weight of each token of each sample, so that the step's loss is their weighted sum.

    - `token`: the mean over all tokens of the optimizer step, as the paper has it;
    - `sequence`: the mean over samples of the mean over each sample's tokens;
    - `dr_grpo`: the sum over tokens divided by samples x `limit`, so that a long response is not
      diluted (Dr. GRPO, arXiv 2503.20783; it also leaves out the division by the deviation).

    Args:
      length_BG: int32 tokens of each response, this process's rows of the optimizer step.
      counted_BG: bool; samples that are left out weigh nothing and are not averaged over.
      aggregation: one of `AGGREGATIONS`.
      limit: most tokens of a response.

    Returns:
      [B, G] float32.
    """
    tokens = all_sum(float(length_BG[counted_BG].sum()))
    samples = all_sum(float(counted_BG.sum()))
    if aggregation == "token":
        weight = np.full(length_BG.shape, 1.0 / max(tokens, 1.0))
    elif aggregation == "sequence":
        weight = 1.0 / (max(samples, 1.0) * np.maximum(length_BG, 1))
    else:
        weight = np.full(length_BG.shape, 1.0 / (max(samples, 1.0) * limit))
    return np.where(counted_BG, weight, 0.0).astype(np.float32)
