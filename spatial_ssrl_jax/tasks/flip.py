"""Flipped patch recognition: which of four patches is flipped, and how."""

from dataclasses import dataclass, field

import numpy as np

from spatial_ssrl_jax.common.bounds import Count, NonNegative, Weights
from spatial_ssrl_jax.tasks.content import MIN_CONTRAST, check_content
from spatial_ssrl_jax.tasks.drawing import draw_labels
from spatial_ssrl_jax.tasks.example import Example, Reject, Task, source_of
from spatial_ssrl_jax.tasks.frame import trim_frame
from spatial_ssrl_jax.tasks.patches import distinct, join_patches, split_patches, thumbnails
from spatial_ssrl_jax.tasks.record import Record
from spatial_ssrl_jax.tasks.weights import weighted_choice

QUESTION = (
    "The image has been divided into 4 labeled 0, 1, 2, and 3. One of the four patches is flipped "
    "either horizontally or vertically. Based on visual clues such as continuity, alignment, and "
    "context, answer the correct patch that is flipped and the direction the flip, where the "
    "format is 'Label-Direction'. The direction can only be 0(flipped vertically) or 1(flipped "
    "horizontally)."
)
DIRECTIONS = ("vertical", "horizontal")  # by their number in the answer, which is the axis too


@dataclass(frozen=True)
class FlipSettings:
    """Settings of the flip task.

    Attributes:
      weight: of the task in the training mixture.
      kinds: weight of each direction.
      min_difference: a patch and its two flips must differ from one another by more than this, in
        grey levels (see `patches`).
      min_side: minimum side of a patch in pixels.
      min_contrast: an image of less contrast is without content, see `content`.
      trim_frame: trim a white or black frame around the image, which reveals patches' positions.
    """

    weight: NonNegative = 4005.0
    kinds: Weights = field(default_factory=lambda: {"vertical": 1.0, "horizontal": 1.0})
    min_difference: NonNegative = 4.0
    min_side: Count = 24
    min_contrast: NonNegative = MIN_CONTRAST
    trim_frame: bool = True


def make(record: Record, rng: np.random.Generator, settings: FlipSettings) -> Example:
    """Flips one of the four patches, uniform over those whose flip is visible."""
    kind = weighted_choice(rng, settings.kinds)
    axis = DIRECTIONS.index(kind)
    image, trimmed = trim_frame(record.image) if settings.trim_frame else (record.image, {})
    check_content(image, settings.min_contrast)
    patches = split_patches(image, 2, 2)
    if min(patches[0].shape[:2]) < settings.min_side:
        raise Reject("image too small for the patches")
    able = [i for i, t in enumerate(thumbnails(patches)) if _is_visible(t, settings.min_difference)]
    if not able:
        raise Reject("every patch looks the same after its flip")
    label = int(rng.choice(able))
    patches[label] = np.flip(patches[label], axis)
    return Example(
        task="flip",
        kind=kind,
        images=(draw_labels(join_patches(patches, 2, 2), 2, 2),),
        question=QUESTION,
        answer=f"{label}-{axis}",
        reason=f"Patch {label} is flipped {'vertically' if axis == 0 else 'horizontally'}.",
        truth={"patch": label, "direction": kind, **trimmed},
        source=source_of(record),
    )


def _is_visible(small: np.ndarray, min_difference: float) -> bool:
    """Whether a thumbnail [16, 16, 3] and its two flips all look different.

    The two flips of a patch look alike when half a turn leaves it the same.
    """
    return distinct(np.stack([small, np.flip(small, 0), np.flip(small, 1)]), min_difference)


TASK = Task("flip", False, FlipSettings, make, chance=lambda example: 1 / 8)
