"""Packing groups: prompts, each with all its responses, one after another in rows of one shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.qwen_vl.attention import GroupLimits
from spatial_ssrl_jax.qwen_vl.config import VisionConfig
from spatial_ssrl_jax.qwen_vl.inputs import PackedRows, VisionInput
from spatial_ssrl_jax.qwen_vl.splash import response_alignment


class Content(NamedTuple):
    """What a row holds, or a group takes of it.

    Attributes:
      tokens: of prompts and responses together.
      patches: of all images.
      responses: response tokens.
    """

    tokens: int
    patches: int
    responses: int


@dataclass(frozen=True)
class RowShape:
    """The shape of a row, for which programs are compiled.

    Attributes:
      capacity: maximum content.
      longest_response: tokens of a response at most.
      largest_group: tokens of a group at most; 0 is the row's.
      for_splash: whether rows are laid out for `attend_splash`; others need no padding in groups.
    """

    capacity: Content
    longest_response: int
    largest_group: int = 0
    for_splash: bool = True

    @property
    def alignment(self) -> int:
        """The first response of a group starts at a multiple of it."""
        if not self.for_splash:
            return 1
        return response_alignment(self.capacity.tokens, self.longest_response)

    @property
    def limits(self) -> GroupLimits:
        """Of the row's groups."""
        return GroupLimits(self.longest_response, self.largest_group or self.capacity.tokens)

    def needed(self, group: Content) -> Content:
        """What a group takes of a row at most, with the padding after its prompt."""
        return group._replace(tokens=group.tokens + self.alignment - 1)

    def holds(self, group: Content) -> bool:
        """Whether a group fits an empty row."""
        needed = self.needed(group)
        fits = all(n <= c for n, c in zip(needed, self.capacity, strict=True))
        return fits and needed.tokens <= self.limits.group


@dataclass(frozen=True)
class Group:
    """A prompt with its responses.

    Attributes:
      prompt: without padding.
      responses: [r] int32 tokens of each, the end token included.
    """

    prompt: Prompt
    responses: Sequence[np.ndarray]

    @property
    def content(self) -> Content:
        """Its content of a row."""
        responses = sum(map(len, self.responses))
        return Content(len(self.prompt.ids) + responses, len(self.prompt.frame), responses)


def assign_rows(
    contents: Sequence[Content], shape: RowShape, limit: int | None = None
) -> tuple[list[list[int]], list[int]]:
    """Which groups share a row: first-fit decreasing, by token count.

    Args:
      contents: of each group.
      shape: of a row.
      limit: rows at most.

    Returns:
      The numbers of the groups in each row, and those that are in none, as they are larger than a
      row or the rows are full.
    """
    rows: list[list[int]] = []
    others: list[int] = []
    most = len(contents) if limit is None else min(limit, len(contents))
    left = np.zeros((most, len(shape.capacity)), np.int64)  # of each row so far
    for group in sorted(range(len(contents)), key=lambda i: -contents[i].tokens):
        need = np.array(shape.needed(contents[group]))
        fits = (need <= left[: len(rows)]).all(axis=1)
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == most or not shape.holds(contents[group]):
            others.append(group)
            continue
        if row == len(rows):
            rows.append([])
            left[row] = shape.capacity
        rows[row].append(group)
        left[row] -= need
    return rows, others


def check_group(content: Content, shape: RowShape) -> None:
    """Raises `UserError` where a row does not hold a group."""
    if not shape.holds(content):
        tokens, patches, responses = content
        padding = f" and {shape.alignment - 1} of padding" if shape.alignment > 1 else ""
        raise UserError(
            f"a prompt with its responses has {tokens} tokens{padding}, {responses} of them in "
            f"responses, and {patches} patches, which a row of {shape.capacity.tokens} tokens, "
            f"{shape.capacity.responses} response tokens and {shape.capacity.patches} patches does "
            "not hold: raise row_tokens, row_responses or row_patches, or leave them out."
        )


class ResponseTokens(NamedTuple):
    """Which token is at each place of the responses of packed rows; -1 where none is.

    Attributes:
      group, sample, token: [B, R] int64, its group, its sample in the group and its index there.
    """

    group: np.ndarray
    sample: np.ndarray
    token: np.ndarray

    def of_tokens(self, values: np.ndarray) -> np.ndarray:
        """[B, R] of values [groups, G, tokens]; 0 where no token is."""
        return self._taken(values, self)

    def of_samples(self, values: np.ndarray) -> np.ndarray:
        """[B, R] of values [groups, G]; 0 where no token is."""
        return self._taken(values, self[:2])

    def _taken(self, values: np.ndarray, places: tuple[np.ndarray, ...]) -> np.ndarray:
        held = self.group >= 0
        found = np.zeros(held.shape, values.dtype)
        found[held] = values[tuple(place[held] for place in places)]
        return found


def fill_rows(
    groups: Sequence[Group],
    rows: Sequence[Sequence[int]],
    shape: RowShape,
    vision: VisionConfig,
) -> tuple[PackedRows[np.ndarray], ResponseTokens]:
    """Lays groups out in rows, padded to `shape`.

    Args:
      groups: all groups of the rows.
      rows: numbers of each row's groups, in their order; a row may be empty.
      shape: of a row.
      vision: the vision tower's shape.
    """
    filler = _Filler.empty(len(rows), shape, vision)
    for row, members in enumerate(rows):
        filler.fill(row, [(number, groups[number]) for number in members])
    return filler.rows, filler.responses


@dataclass(frozen=True)
class _Filler:
    """Writes groups into rows."""

    rows: PackedRows[np.ndarray]
    responses: ResponseTokens
    alignment: int
    merge_unit: int

    @classmethod
    def empty(cls, count: int, shape: RowShape, vision: VisionConfig) -> "_Filler":
        tokens, patches, responses = shape.capacity
        of_patch, of_response = (count, patches), (count, responses)
        images: VisionInput[np.ndarray] = VisionInput(
            patches=np.zeros((*of_patch, vision.patch_dim), np.uint8),
            frame=np.full(of_patch, -1, np.int32),
            coords=np.zeros((*of_patch, 2), np.int32),
        )
        rows: PackedRows[np.ndarray] = PackedRows(
            ids=np.zeros((count, tokens), np.int32),
            segment=np.full((count, tokens), -1, np.int32),
            response=np.zeros((count, tokens), np.int32),
            position=np.zeros((count, 3, tokens), np.int32),
            image_index=np.full((count, tokens), -1, np.int32),
            place=np.full(of_response, -1, np.int32),
            label=np.zeros(of_response, np.int32),
            sample=np.full(of_response, -1, np.int32),
            vision=images,
            limits=shape.limits,
        )
        sources = ResponseTokens(*(np.full(of_response, -1) for _ in ResponseTokens._fields))
        return cls(rows, sources, shape.alignment, vision.merge_unit)

    def fill(self, row: int, groups: Sequence[tuple[int, Group]]) -> None:
        """Writes numbered groups into a row."""
        start, patches, frames, responses, samples = 0, 0, 0, 0, 0
        for segment, (number, group) in enumerate(groups):
            prompt, place = group.prompt, slice(start, start + len(group.prompt.ids))
            self.rows.segment[row, place] = segment
            self._put_prompt(row, place, prompt, patches, frames)
            patches += len(prompt.frame)
            # Images of different groups never share a number: full attention stays inside each.
            frames += int(prompt.frame.max(initial=-1)) + 1
            start = -(-place.stop // self.alignment) * self.alignment
            for sample, tokens in enumerate(group.responses):
                own = slice(start, start + len(tokens))
                self.rows.segment[row, own] = segment
                self.rows.ids[row, own] = tokens
                self.rows.response[row, own] = sample + 1
                order = np.arange(len(tokens))
                self.rows.position[row, :, own] = prompt.next_position + order
                places = slice(responses, responses + len(tokens))
                self.rows.place[row, places] = np.where(order, start - 1 + order, place.stop - 1)
                self.rows.label[row, places] = tokens
                self.rows.sample[row, places] = samples
                self.responses.group[row, places] = number
                self.responses.sample[row, places] = sample
                self.responses.token[row, places] = order
                start, responses = own.stop, places.stop
                samples += len(tokens) > 0  # so that a row has no more of them than tokens

    def _put_prompt(
        self, row: int, place: slice, prompt: Prompt, patches: int, frames: int
    ) -> None:
        """Writes a prompt after others that have some patches and frames in the row."""
        rows, vision = self.rows, self.rows.vision
        assert isinstance(vision, VisionInput)
        rows.ids[row, place] = prompt.ids
        rows.position[row, :, place] = prompt.position
        index, merged = prompt.image_index, patches // self.merge_unit
        rows.image_index[row, place] = np.where(index >= 0, index + merged, -1)
        own = slice(patches, patches + len(prompt.frame))
        vision.patches[row, own] = prompt.patches
        vision.frame[row, own] = prompt.frame + frames
        vision.coords[row, own] = prompt.coords
