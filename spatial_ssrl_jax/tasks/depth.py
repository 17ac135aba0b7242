"""Regional depth ordering: sort three marked regions from near to far."""

from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.common.bounds import Count, Fraction, NonNegative, Positive, Widths
from spatial_ssrl_jax.tasks.drawing import draw_markers
from spatial_ssrl_jax.tasks.example import Example, Reject, Task, source_of
from spatial_ssrl_jax.tasks.record import Record
from spatial_ssrl_jax.tasks.regions import (
    Regions,
    WindowLimits,
    find_regions,
    normalised_depth,
    scaled,
)

QUESTION = (
    "The original image has three regions marked as 1, 2, and 3. Consider the content, positional "
    "relationships, depths of the three regions and other cues, and sort the depths of the three "
    "regions from smallest to largest from the camera, where the format of the answer is "
    "'Smallest-Middle-Largest'."
)
_DRAWS = 4096


@dataclass(frozen=True)
class DepthSettings:
    """Settings of the depth task; pixels are for a shorter side of 768 and scale with the image.

    Attributes:
      weight: of the task in the training mixture.
      windows: window widths in pixels, tried in this order.
      min_window: minimum width of a window in pixels of the image.
      max_range: a region's depths differ by less than this, in normalised depth.
      min_gap: neighbouring regions are further apart than this, in normalised depth.
      min_valid: minimum fraction of valid pixels in a region; lower it for sparse maps.
      centre: side in pixels of the image of a region's centre that must be wholly valid.
      marker: radius of a marker in pixels.
      min_marker: its minimum in pixels of the image.
    """

    weight: NonNegative = 20620.0
    windows: Widths = (25, 11)
    min_window: Count = 7
    max_range: Fraction = 0.15
    min_gap: Fraction = 0.05
    min_valid: Fraction = 0.9
    centre: Count = 7
    marker: Positive = 19.0
    min_marker: Positive = 8.0


def make(record: Record, rng: np.random.Generator, settings: DepthSettings) -> Example:
    """Marks three disjoint regions of clearly different depth."""
    depth = normalised_depth(record)
    radius = round(scaled(settings.marker, settings.min_marker, depth.shape))
    for window in settings.windows:
        limits = WindowLimits(
            half=round(scaled(window, settings.min_window, depth.shape)) // 2,
            max_range=settings.max_range,
            min_valid=settings.min_valid,
            centre=settings.centre,
            margin=radius + 1,
        )
        found = find_regions(depth, limits, rng)
        triple = _draw(found, rng, settings.min_gap, 2 * radius + 2)
        if triple is not None:
            return _example(record, found, rng.permutation(triple), radius)
    raise Reject("no three regions of clearly different depth")


def _draw(
    found: Regions, rng: np.random.Generator, min_gap: float, distance: float
) -> np.ndarray | None:
    """Three windows, uniform over all valid triples; None where there is none.

    For each window as the middle one, the clearly nearer and the clearly farther windows are
    counted in sorted order; their product is the number of triples around it. Drawing the middle by
    that number and the others evenly is uniform over the triples with clear gaps, and taking the
    first draw whose windows and markers are apart keeps it so.
    """
    if len(found) < 3:
        return None
    by_high, by_low = np.argsort(found.high), np.argsort(found.low)
    nearer = np.searchsorted(found.high[by_high], found.low - min_gap, side="left")
    below = np.searchsorted(found.low[by_low], found.high + min_gap, side="right")
    farther = len(found) - below
    ways = np.cumsum(nearer * farther)
    if ways[-1] == 0:
        return None
    middle = np.searchsorted(ways, rng.integers(ways[-1], size=_DRAWS), side="right")
    near = by_high[rng.integers(nearer[middle])]
    far = by_low[below[middle] + rng.integers(farther[middle])]
    triples = np.stack([near, middle, far], axis=1)
    fine = np.flatnonzero(found.apart(triples, distance))
    return triples[fine[0]] if len(fine) else None


def _example(record: Record, found: Regions, chosen: np.ndarray, radius: int) -> Example:
    """The example whose markers 1 to 3 are on the windows `chosen`."""
    points = [found.point(i) for i in chosen]
    depths = [found.mean(i) for i in chosen]
    order = [str(marker + 1) for marker in np.argsort(depths)]
    return Example(
        task="depth",
        kind="depth",
        images=(draw_markers(record.image, points, radius),),
        question=QUESTION,
        answer="-".join(order),
        reason="From near to far the regions are " + ", ".join(order) + ".",
        truth={"points": [list(p) for p in points], "depths": depths, "half": found.half},
        source=source_of(record),
    )


TASK = Task("depth", True, DepthSettings, make, chance=lambda answer: 1 / 6)
