"""Cropped patch inpainting: which of four pictures is the missing square."""

from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from PIL import Image

from spatial_ssrl_jax.data.record import Record
from spatial_ssrl_jax.tasks.example import Example, Reject, Task, source_of
from spatial_ssrl_jax.tasks.patches import difference, thumbnail

QUESTION = (
    "Which image is the missing part in the first image <image1>? Based on visual clues such as "
    "alignment, image content, and positional relationship, select one of the four options "
    "<image2><image3><image4><image5> as the final answer. The final answer should be chosen from "
    "'A', 'B', 'C', and 'D'."
)


def _even() -> dict[str, float]:
    kinds = ("interior", "exterior_25", "exterior_50", "rotate_cw", "rotate_ccw")
    return dict.fromkeys(kinds, 0.2)


@dataclass(frozen=True)
class CropSettings:
    """Attributes:
    weight: share in the training mixture.
    kinds: share of each kind of distractor; three distinct ones are drawn.
    least_difference: options must differ by more than this, in grey levels.
    """

    weight: float = 20200.0
    kinds: dict[str, float] = field(default_factory=_even)
    least_difference: float = 4.0


def make(record: Record, rng: np.random.Generator, settings: CropSettings) -> Example:
    """Blackens a square and offers it among three distractors made from the same picture."""
    height, width = record.image.shape[:2]
    size = min(height, width) // 2
    if size < 28:
        raise Reject("the missing square would be under 28 pixels")
    x, y = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    weights = np.array(list(settings.kinds.values()), float)
    names = list(settings.kinds)
    wrong = rng.choice(names, size=3, replace=False, p=weights / weights.sum())
    kinds = [str(k) for k in rng.permutation(["answer", *wrong])]
    options = [option(record.image, (x, y, size), kind) for kind in kinds]
    small = [thumbnail(o) for o in options]
    if any(difference(a, b) <= settings.least_difference for a, b in combinations(small, 2)):
        raise Reject("two options look alike")
    holed = record.image.copy()
    holed[y : y + size, x : x + size] = 0
    answer = "ABCD"[kinds.index("answer")]
    return Example(
        task="crop",
        kind="crop",
        images=(holed, *options),
        question=QUESTION,
        answer=answer,
        reason=f"Option {answer} continues the picture.",
        truth={"box": [x, y, size], "options": kinds},
        source=source_of(record),
    )


def option(image: np.ndarray, box: tuple[int, int, int], kind: str) -> np.ndarray:
    """One option, [s, s, 3] uint8.

    An exterior square that would reach over the picture's edge is moved inside, so that it keeps
    its aspect (the released code clips it, which shows).
    """
    x, y, size = box
    region = image[y : y + size, x : x + size]
    if kind == "answer":
        return region.copy()
    if kind in ("rotate_cw", "rotate_ccw"):
        return np.ascontiguousarray(np.rot90(region, -1 if kind == "rotate_cw" else 1))
    if kind == "interior":
        low, high = size // 4, size // 4 + size // 2
        return _resize(region[low:high, low:high], size)
    grown = round(size * {"exterior_25": 0.25, "exterior_50": 0.5}[kind])
    side = min(size + 2 * grown, *image.shape[:2])
    left = int(np.clip(x - grown, 0, image.shape[1] - side))
    top = int(np.clip(y - grown, 0, image.shape[0] - side))
    return _resize(image[top : top + side, left : left + side], size)


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


TASK = Task("crop", False, CropSettings, make)
