"""Cropped patch inpainting: which of four images is the missing square."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from spatial_ssrl_jax.common.bounds import Count, NonNegative, Weights
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.tasks.content import MIN_CONTRAST, check_content
from spatial_ssrl_jax.tasks.example import Example, Reject, Size, Task, source_of
from spatial_ssrl_jax.tasks.frame import Box, inner_box
from spatial_ssrl_jax.tasks.patches import difference, thumbnail
from spatial_ssrl_jax.tasks.record import Record
from spatial_ssrl_jax.tasks.weights import weighted_shuffle

QUESTION = (
    "Which image is the missing part in the first image <image1>? Based on visual clues such as "
    "alignment, image content, and positional relationship, select one of the four options "
    "<image2><image3><image4><image5> as the final answer. The final answer should be chosen from "
    "'A', 'B', 'C', and 'D'."
)
DISTRACTORS = ("interior", "exterior_25", "exterior_50", "rotate_cw", "rotate_ccw")
_TURNS = {"rotate_cw": -1, "rotate_ccw": 1}  # quarter turns, counter-clockwise as np.rot90 counts
# Growth on each side, as a fraction of the square's side.
_GROWTH = {"answer": 0.0, "exterior_25": 0.25, "exterior_50": 0.5}

Square = tuple[int, int, int]  # left, top and side in pixels


@dataclass(frozen=True)
class CropSettings:
    """Settings of the crop task.

    Attributes:
      weight: of the task in the training mixture.
      distractors: weight of each kind of wrong option; three distinct ones are drawn.
      min_difference: options must differ by more than this, in grey levels (see `patches`).
      min_side: minimum side of the square in pixels.
      min_contrast: an image of less contrast is without content, see `content`.
      trim_frame: keep squares and options inside a white or black frame around the image, which
        would reveal the answer.
      tries: positions of the square that are tried, for images with plain areas.
    """

    weight: NonNegative = 20200.0
    distractors: Weights = field(default_factory=lambda: dict.fromkeys(DISTRACTORS, 0.2))
    min_difference: NonNegative = 4.0
    min_side: Count = 28
    min_contrast: NonNegative = MIN_CONTRAST
    trim_frame: bool = True
    tries: Count = 6


@dataclass(frozen=True)
class _FramedImage:
    """An image, and the box in it that squares and options are taken from."""

    image: Image.Image
    inside: Box


def make(record: Record, rng: np.random.Generator, settings: CropSettings) -> Example:
    """Blackens a square and offers it among three distractors from the same image."""
    height, width = record.image.shape[:2]
    size = min(height, width) // 2
    if size < settings.min_side:
        raise Reject("image too small for the square")
    check_content(record.image, settings.min_contrast)
    framed = _FramedImage(
        Image.fromarray(record.image),
        inner_box(record.image) if settings.trim_frame else (0, 0, width, height),
    )
    left, top, right, bottom = framed.inside
    for _ in range(settings.tries):
        # Drawn until one gives four different options: uniform over the positions that do.
        x = int(rng.integers(left, right - size + 1))
        y = int(rng.integers(top, bottom - size + 1))
        square = (x, y, size)
        wrong = _distractors(framed, square, settings, rng)
        if wrong is not None:
            kinds = [str(kind) for kind in rng.permutation(["answer", *wrong])]
            return _example(record, framed, square, kinds)
    raise Reject("options look alike")


def _option(framed: _FramedImage, square: Square, kind: str) -> np.ndarray:
    """One option, [s, s, 3] uint8: the square itself or a distractor of `kind`."""
    x, y, size = square
    if kind == "answer" or kind in _TURNS:
        region = np.asarray(framed.image.crop((x, y, x + size, y + size)))
        return np.ascontiguousarray(np.rot90(region, _TURNS.get(kind, 0)))
    # Cropped first: `resize(box=…)` would blend in pixels from beyond the box.
    source = framed.image.crop(_source_box(framed.inside, square, kind))
    return np.asarray(source.resize((size, size), Image.Resampling.BICUBIC))


def _source_box(inside: Box, square: Square, kind: str) -> Box:
    """The box of the image that an option shows, before it is resized.

    A grown square that would reach over the image's edge is moved inside: the released code clips
    it instead, which changes its aspect and so reveals a wrong option.
    """
    (left, top, right, bottom), (x, y, size) = inside, square
    if kind == "interior":
        low, high = size // 4, 3 * size // 4
        return x + low, y + low, x + high, y + high
    grown = round(_GROWTH[kind] * size)
    side = min(size + 2 * grown, right - left, bottom - top)
    left = min(max(x - grown, left), right - side)
    top = min(max(y - grown, top), bottom - side)
    return left, top, left + side, top + side


def _distractors(
    framed: _FramedImage, square: Square, settings: CropSettings, rng: np.random.Generator
) -> list[str] | None:
    """Three kinds that look different from the answer and one another, or None.

    They are drawn by weight without replacement; those that look like an earlier one are skipped.
    """
    drawn = weighted_shuffle(rng, settings.distractors)
    if len(drawn) < 3:
        raise UserError("tasks.crop.distractors needs at least three kinds with a weight above 0.")
    taken = {"answer": thumbnail(framed.image, _source_box(framed.inside, square, "answer"))}
    for kind in drawn:
        if kind in _TURNS:
            small = np.rot90(taken["answer"], _TURNS[kind])
        else:
            small = thumbnail(framed.image, _source_box(framed.inside, square, kind))
        if all(difference(small, t) > settings.min_difference for t in taken.values()):
            taken[kind] = small
        if len(taken) == 4:
            return list(taken)[1:]
    return None


def _example(record: Record, framed: _FramedImage, square: Square, kinds: list[str]) -> Example:
    x, y, size = square
    holed = record.image.copy()
    holed[y : y + size, x : x + size] = 0
    answer = "ABCD"[kinds.index("answer")]
    return Example(
        task="crop",
        kind="crop",
        images=(holed, *(_option(framed, square, kind) for kind in kinds)),
        question=QUESTION,
        answer=answer,
        reason=f"Option {answer} continues the picture.",
        truth={"box": [x, y, size], "options": kinds},
        source=source_of(record),
    )


def sizes(size: Size, settings: CropSettings) -> list[Size]:
    """The image, and four squares of half its shorter side."""
    side = min(size) // 2
    return [size, *[(side, side)] * 4]


TASK = Task("crop", False, CropSettings, make, sizes, chance=lambda example: 1 / 4)
