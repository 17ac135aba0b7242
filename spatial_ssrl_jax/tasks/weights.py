"""Drawing among named varieties by their configured weights."""

import numpy as np

from spatial_ssrl_jax.common.errors import UserError


def weighted_choice(rng: np.random.Generator, weights: dict[str, float]) -> str:
    """One name, drawn in proportion to its weight.

    Raises:
      UserError: a weight is negative, or none is above 0.
    """
    names, probabilities = _probabilities(weights)
    return str(rng.choice(names, p=probabilities))


def weighted_shuffle(rng: np.random.Generator, weights: dict[str, float]) -> list[str]:
    """All names with a weight above 0, each drawn in proportion among those that are left.

    Raises:
      UserError: a weight is negative, or none is above 0.
    """
    names, probabilities = _probabilities(weights)
    return [str(n) for n in rng.choice(names, size=len(names), replace=False, p=probabilities)]


def _probabilities(weights: dict[str, float]) -> tuple[list[str], np.ndarray]:
    """The names whose weight is not 0, and their probabilities."""
    names = [name for name, weight in weights.items() if weight]
    values = np.array([weights[name] for name in names], float)
    if not names or (values < 0).any():
        raise UserError(
            f"the weights of {', '.join(weights)} must be 0 or more, with at least one above 0."
        )
    return names, values / values.sum()
