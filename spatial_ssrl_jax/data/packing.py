"""Packing examples: prompts and responses of several, concatenated in rows of one shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.qwen_vl.inputs import PackedRows, VisionInput


@dataclass(frozen=True)
class RowCapacity:
    """Maximum content of a row, or the content of an example.

    Attributes:
      tokens: of prompts and responses together.
      windows: vision windows of all images.
      responses: response tokens.
    """

    tokens: int
    windows: int
    responses: int


@dataclass(frozen=True)
class PackedExample:
    """A prompt with the response to learn.

    Attributes:
      prompt: without padding.
      response: [r] int32 tokens, the end token included.
    """

    prompt: Prompt
    response: np.ndarray

    @property
    def size(self) -> RowCapacity:
        """Its content of a row."""
        response = len(self.response)
        return RowCapacity(len(self.prompt.ids) + response, len(self.prompt.frame), response)


def assign_rows(sizes: Sequence[RowCapacity], capacity: RowCapacity) -> list[list[int]]:
    """Which examples share a row: first-fit decreasing, by token count.

    Args:
      sizes: content of each example.
      capacity: of a row.

    Returns:
      The numbers of the examples in each row; each example is in one row.

    Raises:
      UserError: an example is larger than a row.
    """
    rows: list[list[int]] = []
    left: list[np.ndarray] = []
    empty, needs = _numbers(capacity), [_numbers(size) for size in sizes]
    for example in sorted(range(len(sizes)), key=lambda i: -sizes[i].tokens):
        need = needs[example]
        if (need > empty).any():
            raise UserError(
                f"an example of {need[0]} tokens, {need[1]} windows and {need[2]} response tokens "
                "does not fit a row: raise sft.row_tokens, sft.row_windows or sft.row_responses."
            )
        row = next((i for i, free in enumerate(left) if (need <= free).all()), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(empty.copy())
        rows[row].append(example)
        left[row] -= need
    return rows


def _numbers(capacity: RowCapacity) -> np.ndarray:
    return np.array([capacity.tokens, capacity.windows, capacity.responses])


def fill_rows(
    examples: Sequence[PackedExample],
    rows: Sequence[Sequence[int]],
    capacity: RowCapacity,
    patch_dim: int,
    window_patches: int,
    merge_unit: int,
) -> PackedRows[np.ndarray]:
    """Lays examples out in rows, padded to `capacity`.

    Args:
      examples: all examples of the rows.
      rows: indices of each row's examples, in their order; a row may be empty.
      capacity: of a row.
      patch_dim, window_patches, merge_unit: values in a patch, patches in a window and patches in
        a merged token.
    """
    count = len(rows)
    window = (count, capacity.windows, window_patches)
    vision: VisionInput[np.ndarray] = VisionInput(
        patches=np.zeros((*window, patch_dim), np.uint8),
        frame=np.full(window, -1, np.int32),
        coords=np.zeros((*window, 2), np.int32),
    )
    out: PackedRows[np.ndarray] = PackedRows(
        ids=np.zeros((count, capacity.tokens), np.int32),
        segment=np.full((count, capacity.tokens), -1, np.int32),
        position=np.zeros((count, 3, capacity.tokens), np.int32),
        image_index=np.full((count, capacity.tokens), -1, np.int32),
        place=np.full((count, capacity.responses), -1, np.int32),
        vision=vision,
    )
    for row, members in enumerate(rows):
        start, frames = RowCapacity(0, 0, 0), 0
        for segment, example in enumerate(members):
            _put(out, row, segment, start, frames, examples[example], window_patches // merge_unit)
            start = _after(start, examples[example].size)
            frames += int(examples[example].prompt.frame.max(initial=-1)) + 1
    return out


def _put(
    out: PackedRows[np.ndarray],
    row: int,
    segment: int,
    start: RowCapacity,
    frames: int,
    example: PackedExample,
    merged: int,
) -> None:
    """Writes one example after those that take `start` of its row and have `frames` frames."""
    prompt, response, end = example.prompt, example.response, _after(start, example.size)
    whole, answer = slice(start.tokens, end.tokens), end.tokens - len(response)
    text = slice(start.tokens, answer)
    out.ids[row, whole] = np.concatenate((prompt.ids, response))
    out.segment[row, whole] = segment
    out.position[row, :, text] = prompt.position
    out.position[row, :, answer : end.tokens] = prompt.next_position + np.arange(len(response))
    index = prompt.image_index
    out.image_index[row, text] = np.where(index >= 0, index + start.windows * merged, -1)
    out.place[row, start.responses : end.responses] = answer - 1 + np.arange(len(response))
    windows, vision = slice(start.windows, end.windows), out.vision
    vision.patches[row, windows] = prompt.patches
    # Images of different examples never share a number: full attention stays inside each.
    vision.frame[row, windows] = np.where(prompt.frame >= 0, prompt.frame + frames, -1)
    vision.coords[row, windows] = prompt.coords


def _after(start: RowCapacity, size: RowCapacity) -> RowCapacity:
    return RowCapacity(
        start.tokens + size.tokens,
        start.windows + size.windows,
        start.responses + size.responses,
    )
