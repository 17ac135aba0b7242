"""Which questions are asked together: prompts alike in size, in few shapes, the largest first."""

from collections.abc import Sequence
from dataclasses import dataclass

from spatial_ssrl_jax.data.processor import PromptSize
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig

_TOKENS = 32768  # most prompt tokens at a time on each part of the mesh, padding included
_GROWTH = 1.5  # from one size to the next; what is between is padded
_SCORES, _FEWEST = 2**28, 32  # most attention scores at a time, and fewest queries
_MIN = PromptSize(tokens=128, windows=8)


@dataclass(frozen=True)
class QuestionBatch:
    """Questions that are asked together.

    Attributes:
      places: which questions, at most `size`.
      size: prompts of the batch; a multiple of the mesh's parts.
      shape: tokens and windows that each prompt is padded to.
    """

    places: tuple[int, ...]
    size: int
    shape: PromptSize


def plan_batches(
    extents: Sequence[PromptSize], shards: int, most: int, near: Sequence[str] | None = None
) -> list[QuestionBatch]:
    """Sorts questions by the size of their prompts and cuts them into batches.

    The largest come first, so that what does not fit into memory is known at once. A shape that
    would not fill one batch joins the next larger one: each is compiled for itself.

    Args:
      extents: size of each prompt.
      shards: parts that the batch axis is cut into.
      most: prompts at a time on each part.
      near: questions of one size and one name here are together.
    """
    shapes = [_rounded(extent) for extent in extents]

    def order(i: int) -> tuple:
        return -shapes[i].windows, -shapes[i].tokens, near[i] if near else "", i

    groups: list[tuple[list[int], PromptSize]] = []
    for i in sorted(range(len(extents)), key=order):
        if groups and (shapes[i] == groups[-1][1] or _room(groups[-1], shards, most)):
            places, shape = groups[-1]
            groups[-1] = ([*places, i], _larger(shape, shapes[i]))
        else:
            groups.append(([i], shapes[i]))
    return [batch for group in groups for batch in _cut(*group, shards, most)]


def queries_at_a_time(config: QwenVLConfig, shape: PromptSize, rows: int, most: int) -> int:
    """How many queries attend at a time, so that their scores against all keys fit.

    A video's frames are keys by the hundred thousand.

    Args:
      config: the model's shape.
      shape: of each prompt.
      rows: prompts on each part of the mesh.
      most: queries at most.
    """
    patches = config.vision.num_heads * shape.windows * config.vision.window_patches
    scores = rows * max(patches, config.text.num_attention_heads * shape.tokens)  # of one query
    few = max(_SCORES // scores, _FEWEST)
    return min(1 << few.bit_length() - 1, most)


def _rounded(extent: PromptSize) -> PromptSize:
    return PromptSize(
        _step(extent.tokens, _MIN.tokens),
        _step(extent.windows, _MIN.windows) if extent.windows else 0,
    )


def _step(size: int, least: int) -> int:
    """The smallest step that holds `size`: multiples of `least`, each half as large again."""
    step = least
    while step < size:
        step = -(-int(step * _GROWTH) // least) * least
    return step


def _larger(a: PromptSize, b: PromptSize) -> PromptSize:
    return PromptSize(max(a.tokens, b.tokens), max(a.windows, b.windows))


def _size(shape: PromptSize, shards: int, most: int) -> int:
    return shards * max(1, min(most, _TOKENS // shape.tokens))


def _room(group: tuple[list[int], PromptSize], shards: int, most: int) -> bool:
    places, shape = group
    return len(places) < _size(shape, shards, most)


def _cut(places: list[int], shape: PromptSize, shards: int, most: int) -> list[QuestionBatch]:
    needed = shards
    while needed < len(places):
        needed *= 2
    size = min(_size(shape, shards, most), needed)
    parts = [tuple(places[first : first + size]) for first in range(0, len(places), size)]
    return [QuestionBatch(part, size, shape) for part in parts]
