"""Depth regions: normalised depth, and statistics of many windows at once.

A region is a square window of the depth map. Its candidates' centres are on an even grid whose
offset is drawn, so that every pixel may be a centre while a large map costs little more than a
small one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.tasks.example import Reject
from spatial_ssrl_jax.tasks.record import Record

_REFERENCE = 768  # shorter side in pixels for which the method's pixel constants hold
_CENTRES = 32_768  # about as many candidates a map, on the grid
_SAMPLE = 65_536  # about as many pixels are used for the percentiles
_MIN_SAMPLE = 1024  # valid ones among them; else all pixels are used
_SPARSE = 0.1  # of the windows valid enough; of cameras' maps 0.3 to 0.97, of LiDAR's none


@dataclass(frozen=True)
class WindowLimits:
    """What a window must satisfy.

    Attributes:
      half: half its width in pixels: the window is [c - half, c + half] on both axes.
      max_range: its valid depths differ by less than this, in normalised depth.
      min_valid: minimum fraction of valid pixels.
      centre: side in pixels of its centre that must be wholly valid, odd.
      margin: minimum distance in pixels of its centre from the image's edge.
    """

    half: int
    max_range: float
    min_valid: float
    centre: int
    margin: int


@dataclass(frozen=True)
class Regions:
    """The windows of an image that may serve as regions.

    Attributes:
      depth: [H, W] float32 normalised to [0, 1], NaN where invalid.
      half: half the windows' width in pixels.
      x, y: [n] int64 centres in pixels.
      low, high: [n] float64 minimum and maximum normalised depth in each window.
      valid: fraction of all windows that have enough valid pixels, of whatever range.
    """

    depth: np.ndarray
    half: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    valid: float = 1.0

    def __len__(self) -> int:
        return len(self.x)

    def point(self, index: int) -> tuple[int, int]:
        """Centre [x, y] of one window, in pixels."""
        return int(self.x[index]), int(self.y[index])

    def mean(self, index: int) -> float:
        """Mean normalised depth of one window over its valid pixels."""
        (x, y), h = self.point(index), self.half
        window = self.depth[y - h : y + h + 1, x - h : x + h + 1]
        return float(np.nanmean(window, dtype=np.float64))

    def reject(self, task: str, reason: str) -> Reject:
        """Why a task finds too few regions: a `reason`, or depth too sparse for its settings."""
        if self.valid < _SPARSE:
            reason = (
                "hardly any region has enough valid depth (for sparse maps lower "
                f"tasks.{task}.min_valid and tasks.{task}.centre)"
            )
        return Reject(reason)

    def apart(self, groups: np.ndarray, distance: float) -> np.ndarray:
        """Which groups have disjoint windows and centres more than `distance` pixels apart.

        Args:
          groups: [m, k] indices of windows.

        Returns:
          [m] bool.
        """
        x, y = self.x[groups], self.y[groups]
        fine = np.ones(len(groups), bool)
        for i in range(groups.shape[1]):
            for j in range(i):
                dx, dy = np.abs(x[:, i] - x[:, j]), np.abs(y[:, i] - y[:, j])
                fine &= np.maximum(dx, dy) > 2 * self.half
                fine &= dx * dx + dy * dy > distance**2
        return fine


def scaled(pixels: float, floor: float, shape: tuple[int, int]) -> float:
    """A pixel constant of the method for an image of `shape` (H, W), at least `floor`."""
    return max(floor, pixels * min(shape) / _REFERENCE)


def normalised_depth(record: Record, extremes: bool = False) -> np.ndarray:
    """A record's depth mapped so that its 0.5 and 99.5 percentiles are 0 and 1, clipped.

    Percentiles are those of some 65,000 pixels on an even grid.

    Args:
      record: with depth.
      extremes: map the least and the largest depth of all pixels to 0 and 1 instead.

    Returns:
      [H, W] float32, NaN where invalid.

    Raises:
      Reject: there is no map, it has another size than the image, or it is constant or invalid.
    """
    depth = record.depth
    if depth is None:
        raise Reject("no depth map")
    if depth.shape != record.image.shape[:2]:
        raise Reject("depth map of another size than the image")
    step = 1 if extremes else max(1, round(np.sqrt(depth.size / _SAMPLE)))
    sample = depth[::step, ::step]
    sample = sample[np.isfinite(sample)]
    if sample.size < _MIN_SAMPLE:
        sample = depth[np.isfinite(depth)]
    if sample.size == 0:
        raise Reject("depth map without valid pixels")
    ends = (0, 100) if extremes else (0.5, 99.5)
    low, high = np.percentile(sample.astype(np.float64), ends)
    if not high > low:
        raise Reject("constant depth map")
    unit = (depth - np.float32(low)) / np.float32(high - low)
    np.clip(unit, 0.0, 1.0, out=unit)
    infinite = np.isinf(depth)
    if infinite.any():
        unit[infinite] = np.nan
    return unit


def find_regions(depth: np.ndarray, limits: WindowLimits, rng: np.random.Generator) -> Regions:
    """All windows on a grid with a drawn offset that satisfy the limits.

    Args:
      depth: [H, W] float32 normalised depth, NaN where invalid.
      limits: what a window must satisfy.
      rng: draws the grid's offset.
    """
    stride = max(1, round(np.sqrt(depth.size / _CENTRES)))
    edge = max(limits.margin, limits.half)
    y, x = (_centres(size, edge, stride, rng) for size in depth.shape)
    low, high, fits = _statistics(depth, limits, y, x)
    valid = float(fits.mean()) if fits.size else 1.0
    fits &= high - low < limits.max_range
    row, col = np.nonzero(fits)
    return Regions(depth, limits.half, x[col], y[row], low[fits], high[fits], valid)


def _centres(size: int, edge: int, stride: int, rng: np.random.Generator) -> np.ndarray:
    """Every `stride`-th coordinate of one axis, at least `edge` from both ends."""
    span = max(size - 2 * edge, 0)
    offset = int(rng.integers(max(1, min(stride, span))))
    return np.arange(edge + offset, edge + span, stride)


def _statistics(
    depth: np.ndarray, limits: WindowLimits, y: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Min and max depth [rows, cols] float64 of each window, and whether it is valid enough.

    Without a valid pixel they are +inf and -inf, and the window counts as not valid enough.
    """
    half = limits.half
    shape = (len(y), len(x))
    if 0 in shape:
        return np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    invalid = np.isnan(depth)
    holes = bool(invalid.any())
    shallow = np.where(invalid, np.float32(np.inf), depth) if holes else depth
    deep = np.where(invalid, np.float32(-np.inf), depth) if holes else depth
    low = _over_windows(shallow, half, y, x, _slide(np.minimum)).astype(np.float64)
    high = _over_windows(deep, half, y, x, _slide(np.maximum)).astype(np.float64)
    fits = np.ones(shape, bool)
    if holes:
        missing = _over_windows(invalid.astype(np.int32), half, y, x, _slide_sum)
        fits &= missing <= (1 - limits.min_valid) * (2 * half + 1) ** 2
        fits &= np.isfinite(low)
        inner = min(limits.centre // 2, half)
        fits &= ~_over_windows(invalid, inner, y, x, _slide(np.logical_or))
    return low, high, fits


Reduce = Callable[[np.ndarray, int, int], np.ndarray]


def _over_windows(
    values: np.ndarray, half: int, y: np.ndarray, x: np.ndarray, reduce: Reduce
) -> np.ndarray:
    """`reduce` over the windows around the centres: [len(y), len(x)], one axis after the other."""
    width = 2 * half + 1
    rows = reduce(values[y[0] - half : y[-1] + half + 1], width, 0)[y - y[0]]
    return reduce(rows[:, x[0] - half : x[-1] + half + 1], width, 1)[:, x - x[0]]


def _slide(combine: np.ufunc) -> Reduce:
    """For a `combine` under which a value may count twice: by doubling, with overlap at the end."""

    def reduce(values: np.ndarray, width: int, axis: int) -> np.ndarray:
        reach = 1
        while reach < width:
            step = min(reach, width - reach)
            size = values.shape[axis] - step
            values = combine(_take(values, 0, size, axis), _take(values, step, size, axis))
            reach += step
        return values

    return reduce


def _slide_sum(values: np.ndarray, width: int, axis: int) -> np.ndarray:
    """Sums of `width` neighbours, composed of sums over powers of two."""
    size = values.shape[axis] - width + 1
    total, start, reach = np.zeros((), values.dtype), 0, 1
    while True:
        if width & reach:
            total = total + _take(values, start, size, axis)
            start += reach
        if start == width:
            return total
        length = values.shape[axis] - reach
        values = _take(values, 0, length, axis) + _take(values, reach, length, axis)
        reach *= 2


def _take(values: np.ndarray, start: int, size: int, axis: int) -> np.ndarray:
    """A view of `size` entries from `start` on, along one axis of two."""
    window = slice(start, start + size)
    return values[window] if axis == 0 else values[:, window]
