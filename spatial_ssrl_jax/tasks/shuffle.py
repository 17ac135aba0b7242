"""Shuffled patch reordering: which patch belongs where."""

from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from spatial_ssrl_jax.data.record import Record
from spatial_ssrl_jax.tasks.drawing import draw_labels
from spatial_ssrl_jax.tasks.example import Example, Reject, Task, source_of
from spatial_ssrl_jax.tasks.patches import choose, cut, difference, join, thumbnail

_GRID = (
    "The image has been divided into 4 shuffled patches labeled 0, 1, 2, and 3.{masked} Based on "
    "visual clues such as continuity, alignment, and context, answer the correct arrangement of "
    "the patches to restore the original image, where the format is "
    "'TopLeft-TopRight-BottomLeft-BottomRight'."
)
_MASKED = " One of the four patches is masked completely by white pixels."
_STRIPS = (
    "The image has been divided into {count} shuffled {direction} strips labeled {labels}. Based "
    "on visual clues such as continuity, alignment, and context, answer the correct arrangement of "
    "the strips to restore the original image, where the format is '{form}'."
)
_LABELS = {3: "0, 1, and 2", 4: "0, 1, 2, and 3"}
_FORMS = {
    (1, 3): "Left-Middle-Right",
    (1, 4): "Left-Middle1-Middle2-Right",
    (3, 1): "Top-Middle-Bottom",
    (4, 1): "Top-Middle1-Middle2-Bottom",
}
_SHARES = {
    "2x2": 4000.0,
    "2x2_masked": 4028.0,
    "1x3": 2495.5,
    "1x4": 2495.5,
    "3x1": 1504.5,
    "4x1": 1504.5,
}


@dataclass(frozen=True)
class ShuffleSettings:
    """Attributes:
    weight: share in the training mixture.
    kinds: share of each grid; the paper's counts.
    least_difference: patches must differ by more than this, in grey levels.
    """

    weight: float = 16028.0
    kinds: dict[str, float] = field(default_factory=lambda: dict(_SHARES))
    least_difference: float = 4.0


def make(record: Record, rng: np.random.Generator, settings: ShuffleSettings) -> Example:
    """Cuts the picture, draws its patches in another order, asks for the original one."""
    kind = choose(rng, settings.kinds)
    rows, cols = (int(n) for n in kind.removesuffix("_masked").split("x"))
    patches = cut(record.image, rows, cols)
    if min(patches[0].shape[:2]) < 16:
        raise Reject("patches under 16 pixels")
    masked = int(rng.integers(len(patches))) if kind.endswith("_masked") else None
    _check_distinct(patches, masked, settings.least_difference)
    permutation = np.arange(len(patches))
    while (permutation == np.arange(len(patches))).all():
        permutation = rng.permutation(len(patches))
    drawn = [patches[i] for i in permutation]
    place = None
    if masked is not None:
        place = int(np.flatnonzero(permutation == masked)[0])
        drawn[place] = np.full_like(drawn[place], 255)
    labels = np.argsort(permutation)
    return Example(
        task="shuffle",
        kind=kind,
        images=(draw_labels(join(drawn, rows, cols), rows, cols),),
        question=question(rows, cols, masked is not None),
        answer="-".join(map(str, labels)),
        reason="The order is " + ", ".join(map(str, labels)) + ".",
        truth={
            "rows": rows,
            "cols": cols,
            "permutation": permutation.tolist(),
            "masked": place,
        },
        source=source_of(record),
    )


def question(rows: int, cols: int, masked: bool) -> str:
    """The protocol's question for a grid."""
    if rows == cols == 2:
        return _GRID.format(masked=_MASKED if masked else "")
    return _STRIPS.format(
        count=rows * cols,
        direction="horizontal" if rows == 1 else "vertical",
        labels=_LABELS[rows * cols],
        form=_FORMS[rows, cols],
    )


def _check_distinct(patches: list[np.ndarray], masked: int | None, least: float) -> None:
    small = [thumbnail(p) for i, p in enumerate(patches) if i != masked]
    if any(difference(a, b) <= least for a, b in combinations(small, 2)):
        raise Reject("two patches look alike")


TASK = Task("shuffle", False, ShuffleSettings, make)
