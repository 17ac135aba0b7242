"""Flipped patch recognition: which of four patches is flipped, and how."""

from dataclasses import dataclass, field

import numpy as np

from spatial_ssrl_jax.data.record import Record
from spatial_ssrl_jax.tasks.drawing import draw_labels
from spatial_ssrl_jax.tasks.example import Example, Reject, Task, source_of
from spatial_ssrl_jax.tasks.patches import choose, cut, difference, join, thumbnail

QUESTION = (
    "The image has been divided into 4 labeled 0, 1, 2, and 3. One of the four patches is flipped "
    "either horizontally or vertically. Based on visual clues such as continuity, alignment, and "
    "context, answer the correct patch that is flipped and the direction the flip, where the "
    "format is 'Label-Direction'. The direction can only be 0(flipped vertically) or 1(flipped "
    "horizontally)."
)
DIRECTIONS = ("vertical", "horizontal")


@dataclass(frozen=True)
class FlipSettings:
    """Attributes:
    weight: share in the training mixture.
    kinds: share of each direction.
    least_difference: a patch must differ from its flip by more than this, in grey levels.
    """

    weight: float = 4005.0
    kinds: dict[str, float] = field(default_factory=lambda: {"vertical": 1.0, "horizontal": 1.0})
    least_difference: float = 4.0


def make(record: Record, rng: np.random.Generator, settings: FlipSettings) -> Example:
    """Flips one of four patches that do not look the same after it."""
    kind = choose(rng, settings.kinds)
    axis = DIRECTIONS.index(kind)
    patches = cut(record.image, 2, 2)
    if min(patches[0].shape[:2]) < 16:
        raise Reject("patches under 16 pixels")
    small = [thumbnail(p) for p in patches]
    least = settings.least_difference
    clear = [i for i, t in enumerate(small) if difference(t, np.flip(t, axis)) > least]
    if not clear:
        raise Reject("every patch looks the same after its flip")
    label = int(rng.choice(clear))
    patches[label] = np.flip(patches[label], axis)
    return Example(
        task="flip",
        kind=kind,
        images=(draw_labels(join(patches, 2, 2), 2, 2),),
        question=QUESTION,
        answer=f"{label}-{axis}",
        reason=f"Patch {label} is flipped {'vertically' if axis == 0 else 'horizontally'}.",
        truth={"patch": label, "direction": kind},
        source=source_of(record),
    )


TASK = Task("flip", False, FlipSettings, make)
