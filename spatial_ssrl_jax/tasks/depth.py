"""Regional depth ordering: sort marked regions from near to far, three in the paper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Annotated, Literal

import numpy as np

from spatial_ssrl_jax.common.bounds import (
    Bounds,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Weights,
    Widths,
)
from spatial_ssrl_jax.tasks.answers import grade_order
from spatial_ssrl_jax.tasks.content import MIN_CONTRAST, check_content
from spatial_ssrl_jax.tasks.drawing import draw_markers_fitted, fitted_size
from spatial_ssrl_jax.tasks.example import Example, Reject, Size, Task, source_of
from spatial_ssrl_jax.tasks.places import places_in_words
from spatial_ssrl_jax.tasks.record import Record
from spatial_ssrl_jax.tasks.regions import (
    Regions,
    WindowLimits,
    find_regions,
    normalised_depth,
    scaled,
)
from spatial_ssrl_jax.tasks.weights import weighted_choice

_QUESTION = (
    "The original image has {count} regions marked as {marks}. Consider the content, positional "
    "relationships, depths of the {count} regions and other cues, and sort the depths of the "
    "{count} regions from smallest to largest from the camera, where the format of the answer is "
    "'{format}'."
)
_WORDS = {3: "three", 4: "four", 5: "five", 6: "six"}
_BETWEEN = {  # names of the depths between the smallest and the largest
    3: "Middle",
    4: "Second-Third",
    5: "Second-Third-Fourth",
    6: "Second-Third-Fourth-Fifth",
}
_WEIGHTS = {"3_points": 1.0, "4_points": 0.0, "5_points": 0.0, "6_points": 0.0}
RELEASED_BOX = (930, 693)  # that the released pictures of the task fill, in pixels
_BANDS = ((0.0, 0.3), (0.35, 0.65), (0.7, 1.0))
_DRAWS = 4096


@dataclass(frozen=True)
class DepthSettings:
    """Settings of the depth task; pixels are for a shorter side of 768 and scale with the image.

    Attributes:
      weight: of the task in the training mixture.
      kinds: weight of each number of regions; the paper's has three.
      windows: window widths in pixels, tried in this order.
      min_window: minimum width of a window in pixels of the image.
      max_range: a region's depths differ by less than this, in normalised depth.
      min_gap: neighbouring regions are further apart than this, in normalised depth.
      min_valid: minimum fraction of valid pixels in a region; lower it for sparse maps.
      centre: side in pixels of the image of a region's centre that must be wholly valid.
      bands: `free`, or `released`: as in the released code, the centres of three regions are one in
        each of [0, 0.3], [0.35, 0.65] and [0.7, 1] of normalised depth, which makes wider gaps.
      min_contrast: an image of less contrast is without content, see `content`.
      marker: radius of a marker in pixels.
      min_marker: its minimum in pixels of the image.
      fit_box: (width, height) in pixels that the picture is fitted into once its regions are found,
        `RELEASED_BOX` in the released data; empty keeps the image's size.
    """

    weight: NonNegative = 20620.0
    kinds: Weights = field(default_factory=lambda: dict(_WEIGHTS))
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
    """Marks disjoint regions of clearly different depth."""
    kind = weighted_choice(rng, settings.kinds)
    count = int(kind.removesuffix("_points"))
    check_content(record.image, settings.min_contrast)
    depth = normalised_depth(record)
    radius = round(scaled(settings.marker, settings.min_marker, depth.shape))
    reason = f"no {_WORDS[count]} regions of clearly different depth"
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
        chain = _draw(found, rng, settings, count, 2 * radius + 2)
        if chain is not None:
            return _example(record, found, rng.permutation(chain), radius, settings.fit_box)
        rejected = found.reject("depth", reason)
    raise rejected


def _draw(
    found: Regions, rng: np.random.Generator, settings: DepthSettings, count: int, distance: float
) -> np.ndarray | None:
    """`count` windows from near to far, uniform over all valid ones; None where there is none.

    Rank by rank, it is counted in how many chains with clear gaps each window is the farthest so
    far: as many as all windows clearly nearer have in the rank before. From the last rank back,
    windows are drawn by those numbers, which is uniform over chains, and taking the first draw
    whose windows and markers are apart keeps it so.
    """
    ranks = _candidates(found, settings.bands, count)
    ranks = [rank[np.argsort(found.high[rank])] for rank in ranks]
    chains, nearer = [np.ones(len(ranks[0]))], []  # of each window; windows of the rank before
    for before, rank in zip(ranks[:-1], ranks[1:], strict=True):
        low = found.low[rank] - settings.min_gap
        nearer.append(np.searchsorted(found.high[before], low, side="left"))
        ends = np.concatenate([[0.0], np.cumsum(chains[-1])])
        chains.append(ends[nearer[-1]])
    ends = np.cumsum(chains[-1])
    if not len(ends) or ends[-1] == 0:
        return None
    drawn = np.searchsorted(ends, rng.random(_DRAWS) * ends[-1], side="right")
    places = [drawn]  # in their ranks, from far to near
    for rank in range(count - 2, -1, -1):
        ends = np.concatenate([[0.0], np.cumsum(chains[rank])])
        below = ends[nearer[rank][places[-1]]]
        drawn = np.searchsorted(ends[1:], rng.random(_DRAWS) * below, side="right")
        places.append(drawn)
    columns = [rank[place] for rank, place in zip(ranks, reversed(places), strict=True)]
    groups = np.stack(columns, axis=1)
    pairs = combinations(range(count), 2)
    fine = np.all([found.apart(groups[:, i], groups[:, j], distance) for i, j in pairs], axis=0)
    fine = np.flatnonzero(fine)
    return groups[fine[0]] if len(fine) else None


def _candidates(found: Regions, bands: str, count: int) -> list[np.ndarray]:
    """Indices of the windows that may have each rank, from near to far."""
    if bands == "free" or count != len(_BANDS):
        return [np.arange(len(found))] * count
    centres = found.depth[found.y, found.x]
    return [np.flatnonzero((centres >= low) & (centres <= high)) for low, high in _BANDS]


def _example(
    record: Record, found: Regions, chosen: np.ndarray, radius: int, box: Sequence[int]
) -> Example:
    """The example whose markers are on the windows `chosen`."""
    points = [found.point(i) for i in chosen]
    depths = [found.mean(i) for i in chosen]
    order = [str(marker + 1) for marker in np.argsort(depths)]
    return Example(
        task="depth",
        kind=f"{len(chosen)}_points",
        images=(draw_markers_fitted(record.image, points, radius, box),),
        question=question(len(chosen)),
        answer="-".join(order),
        reason=f"{places_in_words(points, record.image.shape)} "
        f"From near to far the regions are {', '.join(order)}.",
        truth={"points": [list(p) for p in points], "depths": depths, "half": found.half},
        source=source_of(record),
    )


def question(count: int) -> str:
    """The protocol's question for three regions, and its like for more."""
    marks = [str(mark) for mark in range(1, count + 1)]
    return _QUESTION.format(
        count=_WORDS[count],
        marks=", ".join(marks[:-1]) + f", and {marks[-1]}",
        format=f"Smallest-{_BETWEEN[count]}-Largest",
    )


def sizes(size: Size, settings: DepthSettings) -> list[Size]:
    """The picture's."""
    return [fitted_size(size, settings.fit_box)]


def chance(example: Example) -> float:
    """One over the number of orders."""
    return 1 / math.factorial(len(example.answer.split("-")))


TASK = Task("depth", True, DepthSettings, make, sizes, chance, grade_order)
