"""Shuffled patch reordering: which patch belongs where."""

import math
from dataclasses import dataclass, field

import numpy as np

from spatial_ssrl_jax.common.bounds import Count, NonNegative, Weights
from spatial_ssrl_jax.tasks.answers import grade_order
from spatial_ssrl_jax.tasks.content import MIN_CONTRAST, check_content
from spatial_ssrl_jax.tasks.drawing import draw_labels
from spatial_ssrl_jax.tasks.example import Example, Reject, Task, source_of
from spatial_ssrl_jax.tasks.frame import trim_frame
from spatial_ssrl_jax.tasks.patches import distinct, join_patches, split_patches, thumbnails
from spatial_ssrl_jax.tasks.record import Record
from spatial_ssrl_jax.tasks.weights import weighted_choice

_GRID = (
    "The image has been divided into {count} shuffled patches labeled {labels}.{masked} Based on "
    "visual clues such as continuity, alignment, and context, answer the correct arrangement of "
    "the patches to restore the original image, where the format is '{format}'."
)
_MASKED = " One of the four patches is masked completely by white pixels."
_STRIPS = (
    "The image has been divided into {count} shuffled {direction} strips labeled {labels}. Based "
    "on visual clues such as continuity, alignment, and context, answer the correct arrangement of "
    "the strips to restore the original image, where the format is '{format}'."
)
_FORMATS = {
    (2, 2): "TopLeft-TopRight-BottomLeft-BottomRight",
    (3, 3): "TopLeft-Top-TopRight-Left-Middle-Right-BottomLeft-Bottom-BottomRight",
    (1, 3): "Left-Middle-Right",
    (1, 4): "Left-Middle1-Middle2-Right",
    (3, 1): "Top-Middle-Bottom",
    (4, 1): "Top-Middle1-Middle2-Bottom",
}
_WEIGHTS = {
    "2x2": 4000.0,
    "2x2_masked": 4028.0,
    "1x3": 2495.5,
    "1x4": 2495.5,
    "3x1": 1504.5,
    "4x1": 1504.5,
    "3x3": 0.0,
}


@dataclass(frozen=True)
class ShuffleSettings:
    """Settings of the shuffle task.

    Attributes:
      weight: of the task in the training mixture.
      kinds: weight of each grid, named rows x columns; the paper's counts, which has no 3x3.
      min_difference: patches must differ by more than this, in grey levels (see `patches`).
      min_side: minimum side of a patch in pixels.
      min_contrast: an image of less contrast is without content, see `content`.
      trim_frame: trim a white or black frame around the image, which reveals patches' positions.
    """

    weight: NonNegative = 16028.0
    kinds: Weights = field(default_factory=lambda: dict(_WEIGHTS))
    min_difference: NonNegative = 4.0
    min_side: Count = 24
    min_contrast: NonNegative = MIN_CONTRAST
    trim_frame: bool = True


def make(record: Record, rng: np.random.Generator, settings: ShuffleSettings) -> Example:
    """Splits the image, joins its patches in another order and asks for the original one."""
    kind = weighted_choice(rng, settings.kinds)
    rows, cols = (int(n) for n in kind.removesuffix("_masked").split("x"))
    image, trimmed = trim_frame(record.image) if settings.trim_frame else (record.image, {})
    check_content(image, settings.min_contrast)
    patches = split_patches(image, rows, cols)
    if min(patches[0].shape[:2]) < settings.min_side:
        raise Reject("image too small for the patches")
    masked = _mask(patches, kind.endswith("_masked"), settings.min_difference, rng)
    if masked is not None:
        patches[masked] = np.full_like(patches[masked], 255)
    permutation = _permutation(len(patches), rng)
    drawn = join_patches([patches[i] for i in permutation], rows, cols)
    labels = np.argsort(permutation)
    return Example(
        task="shuffle",
        kind=kind,
        images=(draw_labels(drawn, rows, cols),),
        question=question(rows, cols, masked is not None),
        answer="-".join(map(str, labels)),
        reason="The order is " + ", ".join(map(str, labels)) + ".",
        truth={
            "rows": rows,
            "cols": cols,
            "permutation": permutation.tolist(),
            "masked": None if masked is None else int(labels[masked]),
            **trimmed,
        },
        source=source_of(record),
    )


def question(rows: int, cols: int, masked: bool) -> str:
    """The protocol's question for a grid, and its like for 3x3."""
    count = rows * cols
    labels = ", ".join(map(str, range(count - 1))) + f", and {count - 1}"
    words = {"count": count, "labels": labels, "format": _FORMATS[rows, cols]}
    if rows > 1 and cols > 1:
        return _GRID.format(masked=_MASKED if masked else "", **words)
    return _STRIPS.format(direction="horizontal" if rows == 1 else "vertical", **words)


def _permutation(count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform over all permutations but the identity, which would be no puzzle."""
    identity = np.arange(count)
    while True:
        permutation = rng.permutation(count)
        if (permutation != identity).any():
            return permutation


def _mask(
    patches: list[np.ndarray], masked: bool, min_difference: float, rng: np.random.Generator
) -> int | None:
    """The original patch to paint white, or None for a plain kind.

    Uniform over those with which masked all patches look different: the masked patch may look like
    another one, but no other patch may look white.

    Raises:
      Reject: two patches look alike, whichever is masked.
    """
    small = thumbnails(patches)
    if not masked:
        if not distinct(small, min_difference):
            raise Reject("two patches look alike")
        return None
    able = []
    for index in range(len(small)):
        painted = small.copy()
        painted[index] = 255
        if distinct(painted, min_difference):
            able.append(index)
    if not able:
        raise Reject("two patches look alike")
    return int(rng.choice(able))


def chance(example: Example) -> float:
    """One over the number of permutations, the identity excluded."""
    return 1 / max(math.factorial(len(example.answer.split("-"))) - 1, 1)


TASK = Task("shuffle", False, ShuffleSettings, make, chance=chance, grade=grade_order)
