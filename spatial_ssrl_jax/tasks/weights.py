"""Drawing among named varieties by their configured shares."""

import numpy as np

from spatial_ssrl_jax.common.errors import UserError


def weighted_choice(rng: np.random.Generator, shares: dict[str, float]) -> str:
    """One name, drawn in proportion to its share.

    Raises:
      UserError: a share is negative, or none is above 0.
    """
    names, weights = _weights(shares)
    return str(rng.choice(names, p=weights))


def weighted_shuffle(rng: np.random.Generator, shares: dict[str, float]) -> list[str]:
    """All names with a share, each next one drawn in proportion among those that are left.

    Raises:
      UserError: a share is negative, or none is above 0.
    """
    names, weights = _weights(shares)
    return [str(n) for n in rng.choice(names, size=len(names), replace=False, p=weights)]


def _weights(shares: dict[str, float]) -> tuple[list[str], np.ndarray]:
    names = [name for name, share in shares.items() if share]
    weights = np.array([shares[name] for name in names], float)
    if not names or (weights < 0).any():
        raise UserError(
            f"the shares of {', '.join(shares)} must be 0 or more, with at least one above 0."
        )
    return names, weights / weights.sum()
