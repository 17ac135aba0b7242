"""Depth regions: normalised depth, and statistics of many windows at once.

A region is a square window of the depth map. Its candidates' centres are on an even grid whose
offset is drawn, so that every pixel may be a centre while a large map costs little more than a
small one.
"""

from dataclasses import dataclass, replace

import numpy as np

from spatial_ssrl_jax.tasks.example import Reject
from spatial_ssrl_jax.tasks.record import Record

_REFERENCE = 768  # shorter side in pixels for which the method's pixel constants hold
_CENTRES = 32_768  # about as many candidates a map, on the grid
_SAMPLE = 65_536  # about as many pixels are used for the percentiles
_MIN_SAMPLE = 1024  # valid ones among them; else all pixels are used
_SPARSE = 0.1  # of the windows valid enough; of cameras' maps 0.3 to 0.97, of LiDAR's none

Index = int | slice | np.ndarray  # of windows


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

    def apart(self, first: Index, second: Index, distance: float) -> np.ndarray:
        """Which pairs have disjoint windows and centres more than `distance` pixels apart.

        Args:
          first, second: indices of windows, broadcast against each other.

        Returns:
          [m] bool.
        """
        dx, dy = (np.abs(axis[first] - axis[second]) for axis in (self.x, self.y))
        return (np.maximum(dx, dy) > 2 * self.half) & (dx * dx + dy * dy > distance**2)

    def take(self, order: np.ndarray) -> "Regions":
        """Some of the windows, in the order of their indices."""
        kept = {name: getattr(self, name)[order] for name in ("x", "y", "low", "high")}
        return replace(self, **kept)


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
    if extremes:
        low, high = np.float64(sample.min()), np.float64(sample.max())
    else:
        low, high = np.percentile(sample.astype(np.float64), (0.5, 99.5))
    if not high > low:
        raise Reject("constant depth map")
    unit = depth - np.float32(low)
    unit /= np.float32(high - low)
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

    Without a valid pixel they are NaN, and the window counts as not valid enough.
    """
    half = limits.half
    shape = (len(y), len(x))
    if 0 in shape:
        return np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    # Of a number and NaN they take the number.
    low = _over_windows(depth, half, y, x, np.fmin).astype(np.float64)
    high = _over_windows(depth, half, y, x, np.fmax).astype(np.float64)
    fits, invalid = np.ones(shape, bool), np.isnan(depth)
    if invalid.any():
        missing = _over_windows(invalid.astype(np.int32), half, y, x, np.add)
        fits &= missing <= (1 - limits.min_valid) * (2 * half + 1) ** 2
        inner = min(limits.centre // 2, half)
        fits &= ~_over_windows(invalid, inner, y, x, np.logical_or)
    return low, high, fits


def _over_windows(
    values: np.ndarray, half: int, y: np.ndarray, x: np.ndarray, combine: np.ufunc
) -> np.ndarray:
    """`combine` over the windows around evenly spaced centres: [len(y), len(x)]."""
    rows = _over_rows(values, half, y, combine)
    return _over_rows(np.ascontiguousarray(rows.T), half, x, combine).T


def _over_rows(values: np.ndarray, half: int, centres: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """`combine` over the rows [c - half, c + half] around each centre: [n, …].

    Rows are first combined in blocks as high as the centres are apart, which windows share.
    """
    count, width = len(centres), 2 * half + 1
    stride = int(centres[1] - centres[0]) if count > 1 else width
    whole, rest = divmod(width, stride)
    values = values[centres[0] - half :]
    size = (count + whole - 1) * stride
    blocks = combine.reduce(values[:size].reshape(-1, stride, *values.shape[1:]), axis=1)
    parts = [blocks[i : i + count] for i in range(whole)]
    parts += [values[whole * stride + i :: stride][:count] for i in range(rest)]
    found = parts[0].copy()
    for part in parts[1:]:
        combine(found, part, out=found)
    return found
