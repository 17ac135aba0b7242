"""Depth regions: normalised depth, and statistics of the window around every pixel at once."""

from dataclasses import dataclass

import numpy as np

_CENTRE = 7
_REFERENCE = 768


@dataclass(frozen=True)
class Regions:
    """The windows of a picture that may serve as regions.

    Attributes:
      depth: [H, W] float32 normalised to [0, 1], NaN where invalid.
      half: half the windows' width in pixels; a window is [c - half, c + half] on both axes.
      x, y: [n] int32 centres.
      low, high: [n] float32 least and largest normalised depth in each window.
    """

    depth: np.ndarray
    half: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def mean(self, index: int) -> float:
        """Mean normalised depth of one window over its valid pixels."""
        x, y, h = self.x[index], self.y[index], self.half
        return float(np.nanmean(self.depth[y - h : y + h + 1, x - h : x + h + 1]))


def scale(height: int, width: int) -> float:
    """What the method's pixel constants are multiplied by: they hold for a shorter side of 768."""
    return min(height, width) / _REFERENCE


def normalise(depth: np.ndarray) -> np.ndarray | None:
    """Depth mapped so that its 0.5 and 99.5 percentiles are 0 and 1, clipped.

    Percentiles are taken of at most some 65,000 pixels on an even grid. None for a map without
    valid pixels or without any difference in depth.
    """
    step = max(1, int(np.sqrt(depth.size / 65_536)))
    sample = depth[::step, ::step]
    sample = sample[~np.isnan(sample)]
    if sample.size < 16:
        sample = depth[~np.isnan(depth)]
    if sample.size == 0:
        return None
    low, high = np.percentile(sample, (0.5, 99.5))
    if not high > low:
        return None
    return np.clip((depth - np.float32(low)) / np.float32(high - low), 0.0, 1.0)


def find_regions(
    depth: np.ndarray, half: int, most_range: float, least_valid: float, margin: int
) -> Regions:
    """Every window with little depth in it that lies inside the picture.

    Args:
      depth: [H, W] float32 normalised depth, NaN where invalid.
      half: half the window's width in pixels.
      most_range: largest difference of depth inside a window.
      least_valid: least share of valid pixels; the 7x7 centre is always wholly valid.
      margin: pixels that a centre keeps from the picture's edge, at least `half`.
    """
    width = 2 * half + 1
    edge = max(margin, half)
    if min(depth.shape) <= 2 * edge:
        empty = np.zeros(0, np.int32)
        return Regions(depth, half, empty, empty, empty.astype(np.float32), empty.astype(np.float32))
    invalid = np.isnan(depth)
    holes = bool(invalid.any())
    low = _slide(np.where(invalid, np.float32(np.inf), depth) if holes else depth, width, np.minimum)
    high = _slide(np.where(invalid, np.float32(-np.inf), depth) if holes else depth, width, np.maximum)
    fits = high - low <= most_range
    if holes:
        missing = _count(invalid, width)
        fits &= missing <= (1 - least_valid) * width**2
        inner = min(_CENTRE, width)
        cut = (width - inner) // 2
        centre = _count(invalid, inner)
        fits &= centre[cut : cut + fits.shape[0], cut : cut + fits.shape[1]] == 0
    keep = edge - half
    inside = fits[keep : fits.shape[0] - keep, keep : fits.shape[1] - keep]
    y, x = np.nonzero(inside)
    low, high = low[y + keep, x + keep], high[y + keep, x + keep]
    return Regions(depth, half, (x + edge).astype(np.int32), (y + edge).astype(np.int32), low, high)


def _slide(values: np.ndarray, width: int, combine) -> np.ndarray:
    """`combine` over every width x width window, by doubling; [H - width + 1, W - width + 1]."""
    for axis in (0, 1):
        reach = 1
        while reach < width:
            step = min(reach, width - reach)
            ahead = [slice(None)] * 2
            behind = [slice(None)] * 2
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            values = combine(values[tuple(behind)], values[tuple(ahead)])
            reach += step
    return values


def _count(mask: np.ndarray, width: int) -> np.ndarray:
    """True pixels in every width x width window."""
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int32)
    total[1:, 1:] = mask.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
    return total[width:, width:] - total[:-width, width:] - total[width:, :-width] + total[:-width, :-width]


def apart(x: np.ndarray, y: np.ndarray, distance: float, half: int) -> np.ndarray:
    """Which rows of points [n, k] have disjoint windows and centres further apart than `distance`."""
    fine = np.ones(len(x), bool)
    for i in range(x.shape[1]):
        for j in range(i):
            dx, dy = np.abs(x[:, i] - x[:, j]), np.abs(y[:, i] - y[:, j])
            fine &= (np.maximum(dx, dy) > 2 * half) & (dx * dx + dy * dy > distance**2)
    return fine
