"""Batches of a benchmark's questions: prompts of similar size, few shapes, the largest first."""

from collections.abc import Sequence
from dataclasses import dataclass

from spatial_ssrl_jax.data.processor import PromptSize
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig

_MAX_TOKENS = 32768  # prompt tokens of a batch on each shard, padding included
_GROWTH = 1.5  # from one shape to the next; sizes between are padded
_MAX_SCORES, _MIN_QUERIES = 2**28, 32  # attention scores in memory at a time; queries of a chunk
_MIN_SHAPE = PromptSize(tokens=128, patches=512)


@dataclass(frozen=True)
class QuestionBatch:
    """Questions that are asked together.

    Attributes:
      indices: of the questions, at most `size`.
      size: rows of the batch; a multiple of the batch axis's shards.
      shape: tokens and patches that each prompt is padded to.
    """

    indices: tuple[int, ...]
    size: int
    shape: PromptSize


def plan_batches(
    sizes: Sequence[PromptSize], shards: int, max_rows: int, groups: Sequence[str] | None = None
) -> list[QuestionBatch]:
    """Sorts questions by the size of their prompts and divides them into batches.

    The largest come first, so that one that exceeds the memory is known at once. A shape that would
    not fill one batch joins the next larger one: each shape is compiled for itself.

    Args:
      sizes: of each prompt.
      shards: of the batch axis.
      max_rows: prompts of a batch on each shard.
      groups: a name for each question; of one size, questions of one name are next to each other.
    """
    shapes = [_bucket(size) for size in sizes]

    def order(i: int) -> tuple[int, int, str, int]:
        return -shapes[i].patches, -shapes[i].tokens, groups[i] if groups else "", i

    buckets: list[tuple[list[int], PromptSize]] = []
    for i in sorted(range(len(sizes)), key=order):
        if buckets and (shapes[i] == buckets[-1][1] or _has_room(*buckets[-1], shards, max_rows)):
            indices, shape = buckets[-1]
            buckets[-1] = ([*indices, i], _larger(shape, shapes[i]))
        else:
            buckets.append(([i], shapes[i]))
    return [batch for bucket in buckets for batch in _split(*bucket, shards, max_rows)]


def attention_chunk(config: QwenVLConfig, shape: PromptSize, rows: int, max_chunk: int) -> int:
    """Queries that attend at a time, so that their scores against all keys fit into memory.

    A video's frames have hundreds of thousands of keys.

    Args:
      config: the model's shape.
      shape: of each prompt.
      rows: prompts on each shard of the batch.
      max_chunk: upper limit.
    """
    patches = config.vision.num_heads * shape.patches
    scores = rows * max(patches, config.text.num_attention_heads * shape.tokens)  # of one query
    queries = max(_MAX_SCORES // scores, _MIN_QUERIES)
    return min(1 << queries.bit_length() - 1, max_chunk)


def _bucket(size: PromptSize) -> PromptSize:
    return PromptSize(
        _step(size.tokens, _MIN_SHAPE.tokens),
        _step(size.patches, _MIN_SHAPE.patches) if size.patches else 0,
    )


def _step(size: int, smallest: int) -> int:
    """The smallest step that holds `size`: multiples of `smallest`, each half as large again."""
    step = smallest
    while step < size:
        step = -(-int(step * _GROWTH) // smallest) * smallest
    return step


def _larger(a: PromptSize, b: PromptSize) -> PromptSize:
    return PromptSize(max(a.tokens, b.tokens), max(a.patches, b.patches))


def _batch_size(shape: PromptSize, shards: int, max_rows: int) -> int:
    return shards * max(1, min(max_rows, _MAX_TOKENS // shape.tokens))


def _has_room(indices: list[int], shape: PromptSize, shards: int, max_rows: int) -> bool:
    return len(indices) < _batch_size(shape, shards, max_rows)


def _split(
    indices: list[int], shape: PromptSize, shards: int, max_rows: int
) -> list[QuestionBatch]:
    needed = shards
    while needed < len(indices):
        needed *= 2
    size = min(_batch_size(shape, shards, max_rows), needed)
    starts = range(0, len(indices), size)
    return [QuestionBatch(tuple(indices[i : i + size]), size, shape) for i in starts]
