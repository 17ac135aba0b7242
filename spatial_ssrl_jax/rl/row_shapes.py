"""Which shapes of rows an update computes, and how a step's groups are packed into them.

A row's tokens are shared by prompts, which have images, and responses, which have labels. Shapes
differ in how much room they have for each, and a step takes the one in which its groups cost least.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.packing import Content, RowShape, assign_rows, check_group, fill_rows
from spatial_ssrl_jax.parallel.collectives import all_gather
from spatial_ssrl_jax.qwen_vl.compute import AttentionKernel
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig, VisionConfig
from spatial_ssrl_jax.qwen_vl.splash import MAX_ROW_TOKENS
from spatial_ssrl_jax.rl.batch import GroupBatch, PackedBatch
from spatial_ssrl_jax.rl.stages import Stage

# Sizes of rows that are not given: the fraction of the longest row, and which fraction of it is
# prompts'; where a row of a micro-batch has many of a step's groups, and where it has few.
_MANY_GROUPS = 24
_OF_MANY = ((1.0, 0.7), (1.0, 0.53), (1.0, 0.43))
_OF_FEW = ((0.64, 0.45), (0.72, 0.65), (1.0, 0.45))
# Of that fraction what its patches, and the responses beside them, are given room for.
_PATCHES, _NOT_RESPONSES = 0.9, 0.7
_STEP = 64  # of which derived sizes are multiples; the patches of a whole window


def row_shapes(
    config: Config, stage: Stage, kernel: AttentionKernel | None = None
) -> tuple[RowShape, ...]:
    """The shapes of a stage's rows; the last one holds every group that the config allows.

    Args:
      config: the run.
      stage: one of its stages.
      kernel: of attention; None is `splash`, whose rows have more padding.

    Raises:
      UserError: there is one shape, and its rows do not hold the largest group; or rows are too
        long for the kernel.
    """
    settings, limit = stage.settings, config.rollout.max_new_tokens
    group = settings.responses_per_prompt
    prompt, patches = config.data.buckets[-1]
    largest = Content(prompt + group * limit, patches, group * limit)
    named = settings.row_tokens, settings.row_patches, settings.row_responses
    groups = stage.update_prompts / settings.micro_batch_rows
    sizes = [Content(*size) for size in zip(*named, strict=True)]
    for_splash = kernel is None or kernel.name == "splash"
    shapes = shapes_for(largest, limit, groups, sizes, for_splash)
    if kernel is not None and for_splash and shapes[-1].capacity.tokens > MAX_ROW_TOKENS:
        raise UserError(
            f"a prompt of {prompt} tokens with {group} x {limit} response tokens takes a row of "
            f"{shapes[-1].capacity.tokens} tokens, above the {MAX_ROW_TOKENS} of "
            f"model.attention=splash: lower rollout.max_new_tokens, data.prompt_buckets or the "
            "group's size, or set model.attention=xla."
        )
    if len(sizes) == 1 and shapes[0].capacity != sizes[0]:
        raise UserError(
            f"{stage.name}.row_tokens, row_patches and row_responses name one size of rows, of "
            f"{', '.join(map(str, sizes[0]))}, which does not hold the largest prompt, of {prompt} "
            f"tokens and {patches} patches, with {group} x {limit} response tokens: raise them to "
            f"{', '.join(map(str, shapes[0].capacity))}, or name a second size for it."
        )
    return shapes


def shapes_for(
    largest: Content,
    longest_response: int,
    groups: float,
    sizes: Sequence[Content] = (),
    for_splash: bool = True,
) -> tuple[RowShape, ...]:
    """Shapes of rows, without doubles; the last one holds the largest group.

    Args:
      largest: group.
      longest_response: tokens of a response at most.
      groups: of an optimizer step, over the rows of a micro-batch.
      sizes: of each shape; none named derives them.
      for_splash: see `RowShape`.
    """
    whole = _holding(largest, RowShape(largest, longest_response, for_splash=for_splash))
    shapes = [RowShape(size, longest_response, 0, for_splash) for size in sizes]
    if not shapes:
        derived = _derived_sizes(largest, whole.capacity.tokens, groups)
        # Lists of what a token may see are as long as the largest group.
        shapes = [RowShape(s, longest_response, s.tokens // 2, for_splash) for s in derived]
    *others, last = shapes
    last = _holding(largest, replace(last, largest_group=0))
    different = {shape.capacity: shape for shape in others if shape.capacity != last.capacity}
    return (*different.values(), last)


def _derived_sizes(largest: Content, tokens: int, groups: float) -> list[Content]:
    """Sizes of rows that differ in what they have room for, or where a step has few, in length."""
    prompt, sizes = largest.tokens - largest.responses, []
    for scale, share in _OF_FEW if groups < _MANY_GROUPS else _OF_MANY:
        length = _rounded(scale * tokens)
        responses = _rounded((1 - share * _NOT_RESPONSES) * length)
        patches = _rounded(_PATCHES * share * length * largest.patches / prompt)
        sizes.append(Content(length, patches, min(responses, length)))
    return sizes


def _rounded(size: float) -> int:
    return math.ceil(size / _STEP) * _STEP


def _holding(group: Content, shape: RowShape) -> RowShape:
    """The shape, widened where it does not hold a group, whose padding depends on its size."""
    while not shape.holds(group):
        wide = map(max, shape.capacity, shape.needed(group))
        shape = replace(shape, capacity=Content(*wide))
    return shape


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through a program together.

    Attributes:
      shape: of the rows, the same on all processes.
      rows: the numbers of the groups in each of this process's rows; some may be empty.
    """

    shape: RowShape
    rows: tuple[tuple[int, ...], ...]

    @property
    def padded_tokens(self) -> int:
        """Tokens of this process's rows, padding included."""
        return len(self.rows) * self.shape.capacity.tokens


def pack_micro_batches(
    contents: Sequence[Content],
    shapes: Sequence[RowShape],
    micro_batch_rows: int,
    model: QwenVLConfig,
) -> list[MicroBatch]:
    """Packs this process's groups of an optimizer step; all processes get equally many rows.

    Groups go into rows of the shape, or the two, in which the step costs least; what is too large
    for them goes into the last one.

    Args:
      contents: of each group; there may be none.
      shapes: `row_shapes`.
      micro_batch_rows: rows of a micro-batch on all processes.
      model: its size says what a shape costs.

    Returns:
      At least one micro-batch.

    Raises:
      UserError: a group is larger than a row of the last shape.
    """
    size = micro_batch_rows // jax.process_count()
    for content in contents:
        check_group(content, shapes[-1])
    single = [_pack(contents, [(shape, None)], shapes) for shape in shapes]
    counts = _agreed(single, size)
    # All but the last micro-batch of a shape, and what is left in another one.
    pairs = [
        _pack(contents, [(shape, (count - 1) * size), (other, None)], shapes)
        for number, shape in enumerate(shapes)
        for other in shapes
        if other != shape and (count := counts[number][number]) > 1
    ]
    packings = single + pairs
    counts = np.concatenate((counts, _agreed(pairs, size))) if pairs else counts
    costs = [row_cost(shape, model) for shape in shapes]
    best = int((counts @ costs).argmin())
    micro_batches = []
    for shape, rows, count in zip(shapes, packings[best], counts[best].tolist(), strict=True):
        filled = [*map(tuple, rows), *[()] * (count * size - len(rows))]
        micro_batches += [
            MicroBatch(shape, tuple(filled[first : first + size]))
            for first in range(0, len(filled), size)
        ]
    return micro_batches


Packing = list[list[list[int]]]  # the groups of each row of each shape


def _pack(
    contents: Sequence[Content],
    chosen: Sequence[tuple[RowShape, int | None]],
    shapes: Sequence[RowShape],
) -> Packing:
    """Rows of chosen shapes, of each at most so many, and of the last one for what is left."""
    packing: Packing = [[] for _ in shapes]
    left = [*range(len(contents))]
    for shape, limit in (*chosen, (shapes[-1], None)):
        rows, others = assign_rows([contents[i] for i in left], shape, limit)
        packing[shapes.index(shape)] += [[left[i] for i in row] for row in rows]
        left = [left[i] for i in others]
    return packing


def _agreed(packings: Sequence[Packing], size: int) -> np.ndarray:
    """[packings, shapes] micro-batches, as many as the process with most rows needs; not none."""
    rows = np.array([[len(rows) for rows in packing] for packing in packings])
    counts = -(-all_gather(rows[None]).max(axis=0) // size)
    counts[:, -1] += counts.sum(axis=1) == 0
    return counts


def row_cost(shape: RowShape, model: QwenVLConfig) -> float:
    """Multiplications of a row's forward pass, without attention's."""
    text, vision = model.text, model.vision
    tokens, patches, responses = shape.capacity
    cost = tokens * text.layer_weights + patches * vision.block_weights
    return float(cost + responses * text.hidden_size * text.vocab_size)


def empty_packed_batch(
    shape: RowShape, vision: VisionConfig, rows: int = 1
) -> PackedBatch[np.ndarray]:
    """Rows of padding."""
    packed, _ = fill_rows([], [()] * rows, shape, vision)
    of_response = np.zeros(packed.place.shape, np.float32)
    return PackedBatch(packed, of_response, np.zeros((), np.float32))


def empty_group_batch(
    shape: RowShape, vision: VisionConfig, rows: int = 1
) -> GroupBatch[np.ndarray]:
    """Rows of padding, without old and reference log-probabilities."""
    one = empty_packed_batch(shape, vision, rows)
    of_groups = dict.fromkeys(("advantage", "sampled_logprobs"), one.weight)
    return GroupBatch(**vars(one), **of_groups, old_logprobs=None, reference_logprobs=None)
