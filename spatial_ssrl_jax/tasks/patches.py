"""Splitting an image into a grid of patches, and how alike two images look."""

import numpy as np
from PIL import Image

_SIDE = 16


def split_patches(image: np.ndarray, rows: int, cols: int) -> list[np.ndarray]:
    """Patches in reading order, [floor(H/rows), floor(W/cols), 3] each; a remainder is dropped."""
    height, width = image.shape[0] // rows, image.shape[1] // cols
    return [
        image[r * height : (r + 1) * height, c * width : (c + 1) * width]
        for r in range(rows)
        for c in range(cols)
    ]


def join_patches(patches: list[np.ndarray], rows: int, cols: int) -> np.ndarray:
    """The image that `split_patches` would split into `patches`."""
    grid = [np.concatenate(patches[r * cols : (r + 1) * cols], axis=1) for r in range(rows)]
    return np.concatenate(grid, axis=0)


def thumbnail(image: Image.Image, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """An image, or its `box` (left, top, right, bottom), as [16, 16, 3] float32 grey levels."""
    size = (_SIDE, _SIDE)
    small = image.resize(size, Image.Resampling.BOX, box=box, reducing_gap=2.0)
    return np.asarray(small, np.float32)


def thumbnails(patches: list[np.ndarray]) -> np.ndarray:
    """[n, 16, 16, 3] float32 thumbnails."""
    return np.stack([thumbnail(Image.fromarray(patch)) for patch in patches])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two thumbnails in grey levels, 0 to 255.

    Thumbnails, because noise and fine texture do not show a person where a patch belongs.
    """
    return float(np.abs(a - b).mean())


def distinct(small: np.ndarray, min_difference: float) -> bool:
    """Whether all thumbnails [n, 16, 16, 3] differ pairwise by more than `min_difference`."""
    return all(
        difference(small[i], small[j]) > min_difference for i in range(len(small)) for j in range(i)
    )
