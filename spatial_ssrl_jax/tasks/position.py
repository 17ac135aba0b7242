"""Relative 3D position: where is one marked region, seen by a camera at the other."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np

from spatial_ssrl_jax.common.bounds import Bounds, Count, Fraction, NonNegative, Positive, Weights
from spatial_ssrl_jax.tasks.content import MIN_CONTRAST, check_content
from spatial_ssrl_jax.tasks.drawing import draw_markers_fitted, fitted_size
from spatial_ssrl_jax.tasks.example import Example, Size, Task, source_of
from spatial_ssrl_jax.tasks.places import places_in_words
from spatial_ssrl_jax.tasks.record import Record
from spatial_ssrl_jax.tasks.regions import (
    Index,
    Regions,
    WindowLimits,
    find_regions,
    normalised_depth,
    scaled,
)
from spatial_ssrl_jax.tasks.weights import weighted_choice, weighted_shuffle

_QUESTION = (
    "I've taken an image and there are two regions marked as 1, and 2 on the image. Assume that "
    "there is a camera at position '{i}' and it's facing {heading}. According to the camera, where "
    "is the region marker '{j}'? A. {a} B. {b} C. {c} D. {d}. Consider cues such as depth, "
    "orientation, and 3D spatial relationship{tail}. The final answer should be chosen from 'A', "
    "'B', 'C', and 'D'."
)
_TAIL = " and ignore the height difference between the two regions"
HEADINGS = {  # heading -> its words, and its angle counter-clockwise from looking away
    "left": ("to the left of the image", 90),
    "right": ("to the right of the image", 270),
    "towards": ("to me", 180),
    "away": ("to away from me", 0),
}
SINGLE = ("Left", "Right", "Front", "Back")
COMBINED = ("Left-Front", "Left-Back", "Right-Front", "Right-Back")
RELEASED_BOX = (1155, 855)  # that the released pictures of the task fill, in pixels
_DRAWS, _ROUNDS = 4096, 8
_NEAR_PARTS, _CENTRAL, _FIRSTS = 8, 0.45, 256  # of the released choice


@dataclass(frozen=True)
class PositionSettings:
    """Settings of the position task; pixels are for a shorter side of 768 and scale with images.

    Attributes:
      weight: of the task in the training mixture.
      kinds: weight of pairs at like depth, of pairs clear in depth alone, and clear in both axes. A
        kind that an image has no pair for is replaced by another.
      headings: weight of each heading; even as in the paper (the released code has 30/30/30/10).
      window: window width in pixels.
      min_window: minimum width of a window in pixels of the image.
      max_range: a region's depths differ by less than this, in normalised depth.
      min_valid: minimum fraction of valid pixels in a region; lower it for sparse maps.
      centre: side in pixels of the image of a region's centre that must be wholly valid.
      plane: distance along the image plane, in pixels, above which it is clear.
      depth: distance in normalised depth above which it is clear.
      near_height: a pair at like depth differs by less than this in height, in pixels.
      min_near_height: its minimum in pixels of the image.
      choice: `uniform` over the valid pairs, or `released`: as in the released code, depths are
        normalised by their least and largest, the pair nearest the image's centre is taken, and it
        is more than an eighth of the image's shorter side apart, at like depth from left to right.
      min_contrast: an image of less contrast is without content, see `content`.
      marker: radius of a marker in pixels.
      min_marker: its minimum in pixels of the image.
      fit_box: (width, height) in pixels that the picture is fitted into once its regions are found,
        `RELEASED_BOX` in the released data; empty keeps the image's size.
    """

    weight: NonNegative = 20200.0
    kinds: Weights = field(
        default_factory=lambda: {"near": 1.0, "far_single": 1.0, "far_combined": 1.0}
    )
    headings: Weights = field(default_factory=lambda: dict.fromkeys(HEADINGS, 1.0))
    window: Count = 15
    min_window: Count = 7
    max_range: Fraction = 0.15
    min_valid: Fraction = 0.9
    centre: Count = 7
    plane: NonNegative = 150.0
    depth: Fraction = 0.25
    near_height: NonNegative = 30.0
    min_near_height: NonNegative = 4.0
    choice: Literal["uniform", "released"] = "uniform"
    min_contrast: NonNegative = MIN_CONTRAST
    marker: Positive = 19.0
    min_marker: Positive = 8.0
    fit_box: Annotated[tuple[int, ...], Bounds(min=28)] = ()

    def plane_of(self, kind: str, shape: tuple[int, int]) -> float:
        """Pixels above which a pair of a kind is clearly apart from left to right."""
        if self.choice == "released" and kind == "near":
            return min(shape) / _NEAR_PARTS
        return scaled(self.plane, 0, shape)


@dataclass(frozen=True)
class View:
    """A camera at one of two marked regions.

    Attributes:
      points: [x, y] pixels of markers 1 and 2.
      depths: normalised depth of markers 1 and 2.
      camera: the marker it is at, 1 or 2.
      heading: a key of `HEADINGS`.
    """

    points: tuple[tuple[int, int], tuple[int, int]]
    depths: tuple[float, float]
    camera: int
    heading: str

    def direction(self, plane: float, depth: float) -> str:
        """Where the other marker is as the camera sees it: `Left`, `Right-Front`, … or empty.

        Args:
          plane: pixels above which a distance along the image plane is clear.
          depth: normalised depth above which a distance across it is clear.
        """
        x, z = self._offset(plane, depth)
        angle = np.deg2rad(HEADINGS[self.heading][1])
        cos, sin = round(np.cos(angle)), round(np.sin(angle))
        side, ahead = cos * x + sin * z, -sin * x + cos * z
        return "-".join(_clear_words((side, "Right", "Left"), (ahead, "Front", "Back")))

    def in_image(self, plane: float, depth: float) -> str:
        """Where the other marker is from the camera's as the image shows them, in words."""
        x, z = self._offset(plane, depth)
        return " and ".join(_clear_words((x, "right", "left"), (z, "farther", "nearer")))

    def _offset(self, plane: float, depth: float) -> tuple[float, float]:
        """From the camera's marker to the other one, along the image plane and across it.

        In units of the thresholds, so that "clear" is 1 whichever axis the heading turns it to.
        """
        here, there = self.camera - 1, 2 - self.camera
        x = (self.points[there][0] - self.points[here][0]) / plane
        return x, (self.depths[there] - self.depths[here]) / depth


def _clear_words(*axes: tuple[float, str, str]) -> list[str]:
    """Of each axis on which a distance is clear the word for its sign, positive or negative."""
    return [above if value > 0 else below for value, above, below in axes if abs(value) > 1]


def make(record: Record, rng: np.random.Generator, settings: PositionSettings) -> Example:
    """Marks two regions, puts a camera at one and asks for the other."""
    check_content(record.image, settings.min_contrast)
    released = settings.choice == "released"
    depth = normalised_depth(record, extremes=released)
    radius = round(scaled(settings.marker, settings.min_marker, depth.shape))
    limits = WindowLimits(
        half=round(scaled(settings.window, settings.min_window, depth.shape)) // 2,
        max_range=settings.max_range,
        min_valid=settings.min_valid,
        centre=settings.centre,
        margin=radius + 1,
    )
    found = find_regions(depth, limits, rng)
    for kind in weighted_shuffle(rng, settings.kinds):
        pick = _nearest_centre if released else _uniform
        pair = pick(found, rng, kind, settings, 2 * radius + 2)
        if pair is not None:
            i, j = pair
            view = View(
                points=(found.point(i), found.point(j)),
                depths=(found.mean(i), found.mean(j)),
                camera=int(rng.integers(1, 3)),
                heading=weighted_choice(rng, settings.headings),
            )
            clear = settings.plane_of(kind, depth.shape), settings.depth
            return _example(record, view, kind, clear, radius, settings.fit_box, rng)
    raise found.reject("position", "no pair of regions that is clearly apart")


def _uniform(
    found: Regions,
    rng: np.random.Generator,
    kind: str,
    settings: PositionSettings,
    distance: float,
) -> np.ndarray | None:
    """Two windows in marker order, uniform over a kind's valid pairs: drawn until one is valid."""
    if len(found) < 2:
        return None
    for _ in range(_ROUNDS):
        pairs = rng.integers(len(found), size=(_DRAWS, 2))
        first, second = pairs.T
        fine = _clear(found, first, second, kind, settings)
        fine &= found.apart(first, second, distance)
        if fine.any():
            return pairs[np.argmax(fine)]
    return None


def _nearest_centre(
    found: Regions,
    rng: np.random.Generator,
    kind: str,
    settings: PositionSettings,
    distance: float,
) -> np.ndarray | None:
    """The valid pair of a kind nearest the image's centre, in a random order of its markers.

    For each window, from the centre outwards, the others are tried in that order. Windows at the
    image's edges are left out, and only so many first ones are tried: the released code stops after
    15 seconds.
    """
    height, width = found.depth.shape
    dx, dy = np.abs(found.x - width // 2), np.abs(found.y - height // 2)
    inside = np.flatnonzero((dx <= _CENTRAL * width) & (dy <= _CENTRAL * height))
    order = inside[np.argsort(np.hypot(dx, dy)[inside], kind="stable")]
    distance = max(distance, min(height, width) / _NEAR_PARTS)
    near = found.take(order)
    for first in range(min(len(near), _FIRSTS)):
        others = slice(first + 1, None)
        fine = _clear(near, first, others, kind, settings) & near.apart(first, others, distance)
        if fine.any():
            return rng.permutation(order[[first, first + 1 + np.argmax(fine)]])
    return None


def _clear(
    found: Regions, first: Index, second: Index, kind: str, settings: PositionSettings
) -> np.ndarray:
    """Which pairs of windows are of the kind: [m] bool. One clear in neither axis is of no kind."""
    shape = found.depth.shape
    x, y, low, high = ((a[first], a[second]) for a in (found.x, found.y, found.low, found.high))
    wide = np.abs(x[0] - x[1]) > settings.plane_of(kind, shape)
    if kind == "near":
        # All depths of both windows, so that no direction along the depth can be called clear.
        alike = np.maximum(*high) - np.minimum(*low) <= settings.depth
        height = scaled(settings.near_height, settings.min_near_height, shape)
        return alike & wide & (np.abs(y[0] - y[1]) < height)
    gap = np.maximum(low[0] - high[1], low[1] - high[0])
    return (gap > settings.depth) & (wide if kind == "far_combined" else ~wide)


def _example(
    record: Record,
    view: View,
    kind: str,
    clear: tuple[float, float],
    radius: int,
    box: Sequence[int],
    rng: np.random.Generator,
) -> Example:
    """The example of a view, with the distances along the plane and in depth that are clear."""
    right = view.direction(*clear)
    options = [str(o) for o in rng.permutation(COMBINED if right in COMBINED else SINGLE)]
    answer = "ABCD"[options.index(right)]
    a, b, c, d = options
    question = _QUESTION.format(
        i=view.camera,
        j=3 - view.camera,
        heading=HEADINGS[view.heading][0],
        a=a,
        b=b,
        c=c,
        d=d,
        tail="" if kind == "near" else _TAIL,
    )
    return Example(
        task="position",
        kind=kind,
        images=(draw_markers_fitted(record.image, view.points, radius, box),),
        question=question,
        answer=answer,
        reason=f"{places_in_words(view.points, record.image.shape)} From {view.camera}, region "
        f"{3 - view.camera} lies {view.in_image(*clear)} in the image. "
        f"Seen from {view.camera} the region is {right}, option {answer}.",
        truth={
            "points": [list(p) for p in view.points],
            "depths": list(view.depths),
            "camera": view.camera,
            "heading": view.heading,
            "kind": kind,
        },
        source=source_of(record),
    )


def sizes(size: Size, settings: PositionSettings) -> list[Size]:
    """The picture's."""
    return [fitted_size(size, settings.fit_box)]


def chance(example: Example) -> float:
    """One in four corners; one in two directions, whose axis the heading and the words tell."""
    return 1 / 4 if re.search(r"\bA\. \w+-\w+", example.question) else 1 / 2


TASK = Task(
    "position",
    True,
    PositionSettings,
    make,
    sizes,
    chance=chance,
    needs_distances=True,
)
