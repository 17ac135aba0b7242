"""Cutting a picture into a grid of patches, and how alike two patches are."""

import numpy as np
from PIL import Image

_SIDE = 16


def cut(image: np.ndarray, rows: int, cols: int) -> list[np.ndarray]:
    """The patches in reading order, each [floor(H/rows), floor(W/cols), 3]; a remainder is left off."""
    height, width = image.shape[0] // rows, image.shape[1] // cols
    return [
        image[r * height : (r + 1) * height, c * width : (c + 1) * width]
        for r in range(rows)
        for c in range(cols)
    ]


def join(patches: list[np.ndarray], rows: int, cols: int) -> np.ndarray:
    """The picture that `cut` would cut into `patches`."""
    grid = [np.concatenate(patches[r * cols : (r + 1) * cols], axis=1) for r in range(rows)]
    return np.concatenate(grid, axis=0)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """[16, 16, 3] float32 grey levels, for comparing."""
    small = Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two thumbnails in grey levels, 0 to 255."""
    return float(np.abs(a - b).mean())


def choose(rng: np.random.Generator, shares: dict[str, float]) -> str:
    """One key, drawn by its share."""
    weights = np.array(list(shares.values()), float)
    return str(rng.choice(list(shares), p=weights / weights.sum()))
