"""Regional depth ordering: sort three marked regions from near to far."""

from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.data.record import Record
from spatial_ssrl_jax.tasks import regions
from spatial_ssrl_jax.tasks.drawing import draw_markers, marker_radius
from spatial_ssrl_jax.tasks.example import Example, Reject, Task, source_of

QUESTION = (
    "The original image has three regions marked as 1, 2, and 3. Consider the content, positional "
    "relationships, depths of the three regions and other cues, and sort the depths of the three "
    "regions from smallest to largest from the camera, where the format of the answer is "
    "'Smallest-Middle-Largest'."
)
_DRAWS, _ROUNDS = 4096, 8


@dataclass(frozen=True)
class DepthSettings:
    """Attributes:
    weight: share in the training mixture.
    windows: window widths in pixels for a shorter side of 768, tried in this order.
    least_window: floor of a window's width in pixels.
    most_range: largest difference of normalised depth inside a region.
    least_gap: least difference of normalised depth between neighbouring regions.
    least_valid: least share of valid pixels in a region.
    """

    weight: float = 20620.0
    windows: tuple[int, ...] = (25, 11)
    least_window: int = 7
    most_range: float = 0.15
    least_gap: float = 0.05
    least_valid: float = 0.9


def make(record: Record, rng: np.random.Generator, settings: DepthSettings) -> Example:
    """Marks three disjoint regions of clearly different depth."""
    depth = regions.normalise(record.depth)
    if depth is None:
        raise Reject("the depth map is empty or constant")
    height, width = depth.shape
    radius = marker_radius(height, width)
    factor = regions.scale(height, width)
    for size in settings.windows:
        half = max(settings.least_window, round(size * factor)) // 2
        found = regions.find_regions(
            depth, half, settings.most_range, settings.least_valid, radius + 1
        )
        chosen = _draw(found, rng, settings.least_gap, 2 * radius + 2)
        if chosen is not None:
            return _example(record, found, rng.permutation(chosen))
    raise Reject("no three regions of clearly different depth")


def _draw(
    found: regions.Regions, rng: np.random.Generator, least_gap: float, distance: float
) -> np.ndarray | None:
    """Three windows, uniform over all valid triples: triples are drawn until one is valid."""
    if len(found.x) < 3:
        return None
    for _ in range(_ROUNDS):
        triple = rng.integers(len(found.x), size=(_DRAWS, 3))
        order = np.argsort(found.low[triple], axis=1)
        triple = np.take_along_axis(triple, order, axis=1)
        low, high = found.low[triple], found.high[triple]
        fine = ((low[:, 1:] - high[:, :-1]) > least_gap).all(axis=1)
        fine &= regions.apart(found.x[triple], found.y[triple], distance, found.half)
        if fine.any():
            return triple[np.argmax(fine)]
    return None


def _example(record: Record, found: regions.Regions, chosen: np.ndarray) -> Example:
    """`chosen` holds the windows in marker order."""
    points = [(int(found.x[i]), int(found.y[i])) for i in chosen]
    depths = [found.mean(i) for i in chosen]
    order = [str(m + 1) for m in np.argsort(depths)]
    return Example(
        task="depth",
        kind="depth",
        images=(draw_markers(record.image, points),),
        question=QUESTION,
        answer="-".join(order),
        reason="From near to far the regions are " + ", ".join(order) + ".",
        truth={"points": [list(p) for p in points], "depths": depths, "half": found.half},
        source=source_of(record),
    )


TASK = Task("depth", True, DepthSettings, make)
