"""Regional depth ordering: sort three marked regions from near to far."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from spatial_ssrl_jax.common.bounds import Bounds, Count, Fraction, NonNegative, Positive, Widths
from spatial_ssrl_jax.tasks.content import MIN_CONTRAST, check_content
from spatial_ssrl_jax.tasks.drawing import draw_markers_fitted, fitted_size
from spatial_ssrl_jax.tasks.example import Example, Reject, Size, Task, source_of
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
RELEASED_BOX = (930, 693)  # that the released pictures of the task fill, in pixels
_BANDS = ((0.0, 0.3), (0.35, 0.65), (0.7, 1.0))
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
      bands: `free`, or `released`: as in the released code, the regions' centres are one in each of
        [0, 0.3], [0.35, 0.65] and [0.7, 1] of normalised depth, which makes wider gaps.
      min_contrast: an image of less contrast is without content, see `content`.
      marker: radius of a marker in pixels.
      min_marker: its minimum in pixels of the image.
      fit_box: (width, height) in pixels that the picture is fitted into once its regions are found,
        `RELEASED_BOX` in the released data; empty keeps the image's size.
    """

    weight: NonNegative = 20620.0
    windows: Widths = (25, 11)
    min_window: Count = 7
    max_range: Fraction = 0.15
    min_gap: Fraction = 0.05
    min_valid: Fraction = 0.9
    centre: Count = 7
    bands: Literal["free", "released"] = "free"
    min_contrast: NonNegative = MIN_CONTRAST
    marker: Positive = 19.0
    min_marker: Positive = 8.0
    fit_box: Annotated[tuple[int, ...], Bounds(min=28)] = ()


def make(record: Record, rng: np.random.Generator, settings: DepthSettings) -> Example:
    """Marks three disjoint regions of clearly different depth."""
    check_content(record.image, settings.min_contrast)
    depth = normalised_depth(record)
    radius = round(scaled(settings.marker, settings.min_marker, depth.shape))
    reason = "no three regions of clearly different depth"
    rejected = Reject(reason)
    for window in settings.windows:
        limits = WindowLimits(
            half=round(scaled(window, settings.min_window, depth.shape)) // 2,
            max_range=settings.max_range,
            min_valid=settings.min_valid,
            centre=settings.centre,
            margin=radius + 1,
        )
        found = find_regions(depth, limits, rng)
        triple = _draw(found, rng, settings, 2 * radius + 2)
        if triple is not None:
            return _example(record, found, rng.permutation(triple), radius, settings.fit_box)
        rejected = found.reject("depth", reason)
    raise rejected


def _draw(
    found: Regions, rng: np.random.Generator, settings: DepthSettings, distance: float
) -> np.ndarray | None:
    """Three windows from near to far, uniform over all valid triples; None where there is none.

    For each window as the middle one, the clearly nearer and the clearly farther windows are
    counted in sorted order; their product is the number of triples around it. Drawing the middle by
    that number and the others evenly is uniform over the triples with clear gaps, and taking the
    first draw whose windows and markers are apart keeps it so.
    """
    near, middle, far = _candidates(found, settings.bands)
    if not len(middle):
        return None
    by_high, by_low = near[np.argsort(found.high[near])], far[np.argsort(found.low[far])]
    low, high = found.low[middle] - settings.min_gap, found.high[middle] + settings.min_gap
    nearer = np.searchsorted(found.high[by_high], low, side="left")
    below = np.searchsorted(found.low[by_low], high, side="right")
    farther = len(far) - below
    ways = np.cumsum(nearer * farther)
    if ways[-1] == 0:
        return None
    drawn = np.searchsorted(ways, rng.integers(ways[-1], size=_DRAWS), side="right")
    nearest = by_high[rng.integers(nearer[drawn])]
    farthest = by_low[below[drawn] + rng.integers(farther[drawn])]
    triples = np.stack([nearest, middle[drawn], farthest], axis=1)
    fine = np.flatnonzero(found.apart(triples, distance))
    return triples[fine[0]] if len(fine) else None


def _candidates(found: Regions, bands: str) -> list[np.ndarray]:
    """Indices of the windows that may be the near, the middle and the far region."""
    if bands == "free":
        return [np.arange(len(found))] * 3
    centres = found.depth[found.y, found.x]
    return [np.flatnonzero((centres >= low) & (centres <= high)) for low, high in _BANDS]


def _example(
    record: Record, found: Regions, chosen: np.ndarray, radius: int, box: Sequence[int]
) -> Example:
    """The example whose markers 1 to 3 are on the windows `chosen`."""
    points = [found.point(i) for i in chosen]
    depths = [found.mean(i) for i in chosen]
    order = [str(marker + 1) for marker in np.argsort(depths)]
    return Example(
        task="depth",
        kind="depth",
        images=(draw_markers_fitted(record.image, points, radius, box),),
        question=QUESTION,
        answer="-".join(order),
        reason="From near to far the regions are " + ", ".join(order) + ".",
        truth={"points": [list(p) for p in points], "depths": depths, "half": found.half},
        source=source_of(record),
    )


def sizes(size: Size, settings: DepthSettings) -> list[Size]:
    """The picture's."""
    return [fitted_size(size, settings.fit_box)]


TASK = Task("depth", True, DepthSettings, make, sizes, chance=lambda answer: 1 / 6)
