"""Relative 3D position: where is one marked region, seen by a camera at the other."""

from dataclasses import dataclass, field

import numpy as np

from spatial_ssrl_jax.data.record import Record
from spatial_ssrl_jax.tasks import regions
from spatial_ssrl_jax.tasks.drawing import draw_markers, marker_radius
from spatial_ssrl_jax.tasks.example import Example, Reject, Task, source_of
from spatial_ssrl_jax.tasks.patches import choose

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
_DRAWS, _ROUNDS = 4096, 8


@dataclass(frozen=True)
class PositionSettings:
    """Pixel figures hold for a shorter side of 768 and scale with the picture.

    Attributes:
      weight: share in the training mixture.
      kinds: share of pairs at like depth, of pairs clear in depth alone, and clear in both axes.
      headings: share of each heading; the paper's are even (the released code has 30/30/30/10).
      window: window width in pixels.
      least_window: floor of a window's width in pixels.
      most_range: largest difference of normalised depth inside a region.
      least_valid: least share of valid pixels in a region.
      plane: distance in the image plane, in pixels, that counts as clear.
      depth: distance in normalised depth that counts as clear.
      near_height: most difference in height, in pixels, of a pair at like depth.
    """

    weight: float = 20200.0
    kinds: dict[str, float] = field(
        default_factory=lambda: {"near": 1.0, "far_single": 1.0, "far_combined": 1.0}
    )
    headings: dict[str, float] = field(default_factory=lambda: dict.fromkeys(HEADINGS, 1.0))
    window: int = 15
    least_window: int = 7
    most_range: float = 0.15
    least_valid: float = 0.9
    plane: float = 150.0
    depth: float = 0.25
    near_height: float = 30.0


def make(record: Record, rng: np.random.Generator, settings: PositionSettings) -> Example:
    """Marks two regions, puts a camera at one and asks for the other."""
    depth = regions.normalise(record.depth)
    if depth is None:
        raise Reject("the depth map is empty or constant")
    radius = marker_radius(*depth.shape)
    factor = regions.scale(*depth.shape)
    half = max(settings.least_window, round(settings.window * factor)) // 2
    found = regions.find_regions(depth, half, settings.most_range, settings.least_valid, radius + 1)
    kind = choose(rng, settings.kinds)
    pair = _draw(found, rng, kind, settings, factor, 2 * radius + 2)
    if pair is None:
        raise Reject(f"no {kind} pair of regions")
    camera = int(rng.integers(2)) + 1
    heading = choose(rng, settings.headings)
    return _example(record, found, pair, kind, camera, heading, settings, factor, rng)


def _draw(
    found: regions.Regions,
    rng: np.random.Generator,
    kind: str,
    settings: PositionSettings,
    factor: float,
    distance: float,
) -> np.ndarray | None:
    """Two windows in marker order, uniform over the valid pairs of a kind, by drawing until valid."""
    if len(found.x) < 2:
        return None
    plane = settings.plane * factor
    for _ in range(_ROUNDS):
        pair = rng.integers(len(found.x), size=(_DRAWS, 2))
        x, y, low, high = (a[pair] for a in (found.x, found.y, found.low, found.high))
        across = np.abs(x[:, 0] - x[:, 1])
        gap = np.maximum(low[:, 0] - high[:, 1], low[:, 1] - high[:, 0])
        if kind == "near":
            spread = high.max(axis=1) - low.min(axis=1)
            fine = (spread <= settings.depth) & (across > plane)
            fine &= np.abs(y[:, 0] - y[:, 1]) < max(settings.near_height * factor, 4)
        else:
            fine = gap > settings.depth
            fine &= across > plane if kind == "far_combined" else across <= plane
        fine &= regions.apart(x, y, distance, found.half)
        if fine.any():
            return pair[np.argmax(fine)]
    return None


def direction(
    offset: tuple[float, float], heading: str, plane: float, depth: float
) -> tuple[str, ...]:
    """The clear directions of a target as the camera sees them.

    Args:
      offset: target minus camera: pixels to the right in the image, normalised depth away from
        the viewer.
      heading: a key of `HEADINGS`.
      plane, depth: what counts as clear along each axis of the image.

    Returns:
      None, one or two of Left or Right and Front or Back, in this order.
    """
    # In units of the thresholds, so that "clear" is 1 whichever axis the heading turns it to.
    x, z = offset[0] / plane, offset[1] / depth
    angle = np.deg2rad(HEADINGS[heading][1])
    cos, sin = round(np.cos(angle)), round(np.sin(angle))
    side, ahead = cos * x + sin * z, -sin * x + cos * z
    names = []
    if abs(side) > 1:
        names.append("Right" if side > 0 else "Left")
    if abs(ahead) > 1:
        names.append("Front" if ahead > 0 else "Back")
    return tuple(names)


def _example(
    record: Record,
    found: regions.Regions,
    pair: np.ndarray,
    kind: str,
    camera: int,
    heading: str,
    settings: PositionSettings,
    factor: float,
    rng: np.random.Generator,
) -> Example:
    points = [(int(found.x[i]), int(found.y[i])) for i in pair]
    depths = [found.mean(i) for i in pair]
    here, there = camera - 1, 2 - camera
    offset = (points[there][0] - points[here][0], depths[there] - depths[here])
    right = "-".join(direction(offset, heading, settings.plane * factor, settings.depth))
    options = [str(o) for o in rng.permutation(COMBINED if "-" in right else SINGLE)]
    answer = "ABCD"[options.index(right)]
    a, b, c, d = options
    question = _QUESTION.format(
        i=camera,
        j=3 - camera,
        heading=HEADINGS[heading][0],
        a=a,
        b=b,
        c=c,
        d=d,
        tail="" if kind == "near" else _TAIL,
    )
    return Example(
        task="position",
        kind=kind,
        images=(draw_markers(record.image, points),),
        question=question,
        answer=answer,
        reason=f"Seen from {camera} the region is {right}, option {answer}.",
        truth={
            "points": [list(p) for p in points],
            "depths": depths,
            "camera": camera,
            "heading": heading,
            "kind": kind,
        },
        source=source_of(record),
    )


TASK = Task("position", True, PositionSettings, make)
