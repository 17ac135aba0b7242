"""The schedule of a rollout's decode steps: how many rows and cache slots each of them has.

Responses have a long tail: most rows end early, a few run to the limit. As samples finish, decoding
continues with fewer rows, and as responses grow, with wider caches. Each size is a program of its
own, so there are few: with 256 prompts x 5 samples, 2,048 tokens and blocks of 256 these eight,

    all samples in 256, 512, 1,024 and 2,048 slots
    two samples of 128 prompts in 1,024 and 2,048 slots, one of 64 and one of 16 in 2,048

A prompt with more unfinished samples than a size has a prompt takes several of its rows.

Where memory holds fewer prompts than a step has, they are decoded in several batches, and their
leftovers together: a batch stops where few of its samples are unfinished, which wait until there
are as many as fit beside another batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CHECKS = 4  # a block of slots is filled in that many parts, between which rows may leave
_PARTS = ((2, 2), (4, 1), (16, 1))  # of the prompts, and samples of each, for what is left


@dataclass(frozen=True)
class DecodeShape:
    """The size of a decode program.

    Attributes:
      prompts: rows of prompts' caches.
      group: samples of each.
      slots: cache slots of each sample.
    """

    prompts: int
    group: int
    slots: int

    @property
    def samples(self) -> int:
        return self.prompts * self.group

    def has_rows_of(self, other: "DecodeShape") -> bool:
        """Whether they differ in slots alone."""
        return (self.prompts, self.group) == (other.prompts, other.group)

    def columns(self, prompt_tokens: int) -> int:
        """Tokens of all caches, used or not, which XLA's attention reads at each step."""
        return self.prompts * prompt_tokens + self.samples * self.slots

    def holds(self, live_BG: np.ndarray) -> bool:
        """Whether the samples that are unfinished fit."""
        return int(np.ceil(live_BG.sum(axis=1) / self.group).sum()) <= self.prompts


@dataclass(frozen=True)
class Span:
    """Decode steps `start` to `end` of one shape."""

    shape: DecodeShape
    start: int
    end: int

    @property
    def steps(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Rows:
    """Where the rows of the next shape come from.

    Attributes:
      prompt: [b] int32 row of the present shape that each row's prompt is in.
      sample: [b, g] int32 index in that row's group.
      used: [b, g] bool; the others are copies that count as finished.
    """

    prompt: np.ndarray
    sample: np.ndarray
    used: np.ndarray

    def keeps(self, prompts: int) -> bool:
        """Whether the rows' prompts are the present ones, so many, in their order."""
        return np.array_equal(self.prompt, np.arange(prompts))

    def of(self, x_BG: np.ndarray) -> np.ndarray:
        """[b, g] of the values of the present rows."""
        return x_BG[self.prompt[:, None], self.sample]


@dataclass(frozen=True)
class Schedule:
    """The shapes of one rollout, and which of them follows which.

    Attributes:
      shapes: of its decode programs; the first is that of the first step.
      steps_between: steps between two decisions.
      check_every: steps between two checks on the device of whether all have finished.
      prompt_tokens: of each prompt's cache, padding included.
      leftovers: rows in which unfinished samples of several batches wait for one another; a batch
        whose unfinished samples fit stops when it has filled so many slots. None where all go on.
    """

    shapes: tuple[DecodeShape, ...]
    steps_between: int
    check_every: int
    prompt_tokens: int
    leftovers: DecodeShape | None = None

    @classmethod
    def of(
        cls,
        prompts: int,
        group: int,
        limit: int,
        *,
        kv_block: int,
        check_every: int,
        prompt_tokens: int,
        shards: int = 1,
        whole_groups: bool = False,
        batches: int = 1,
        longest_prompt: int = 0,
    ) -> "Schedule":
        """The schedule of a rollout.

        Args:
          prompts, group: B and G.
          limit: R, the most tokens of a response.
          kv_block: slots at the start; they double up to `limit`.
          check_every: decode steps that a program does at least; divides `kv_block`.
          prompt_tokens: of each prompt's cache.
          shards: of the batch axis, which divide every shape's prompts.
          whole_groups: groups leave when all of their samples have finished, and not before.
          batches: rollout batches that are decoded one after another. The leftovers of three or
            more wait for one another, if there are three widths of caches or more.
          longest_prompt: tokens of the longest prompts' caches of all of these batches.
        """
        slots = _slots(kv_block, limit)
        shapes = [DecodeShape(prompts, group, width) for width in slots]
        leftovers = None
        if batches > 2 and len(slots) > 2 and not whole_groups:
            leftovers = _leftovers(shapes, max(longest_prompt, prompt_tokens), shards)
        if leftovers:
            rows = leftovers.prompts
            parts = [(rows, width) for width in slots if width > leftovers.slots]
            parts += [(-(-rows // divisor // shards) * shards, limit) for divisor in (4, 16)]
            shapes += dict.fromkeys(DecodeShape(count, 1, width) for count, width in parts)
        elif len(slots) > 1:  # in one block there is no tail
            first, *rest = (
                (-(-prompts // divisor // shards) * shards, group if whole_groups else few)
                for divisor, few in ((divisor, min(few, group)) for divisor, few in _PARTS)
            )
            parts = [(*first, slots[-2]), (*first, limit), *((*part, limit) for part in rest)]
            found = dict.fromkeys(DecodeShape(*part) for part in parts)
            shapes += [shape for shape in found if shape.samples < prompts * group]
        between = max(kv_block // _CHECKS // check_every, 1) * check_every
        return cls(tuple(shapes), between, check_every, prompt_tokens, leftovers)

    def next_shape(self, shape: DecodeShape, live_BG: np.ndarray, cursor: int) -> DecodeShape:
        """The shape of the next steps: that which reads the least.

        Args:
          shape: of the steps until now.
          live_BG: bool, which of its samples have not finished.
          cursor: tokens that each of them has.
        """
        fitting = [
            other
            for other in self.shapes
            if max(shape.slots, cursor + 1) <= other.slots and other.holds(live_BG)
        ]
        return min(fitting, key=lambda other: other.columns(self.prompt_tokens))

    def before(self, shape: DecodeShape) -> DecodeShape:
        """The shape from which a later one is expected to be reached, if it is."""
        earlier = self.shapes[: self.shapes.index(shape)]
        return next(other for other in reversed(earlier) if other.slots <= shape.slots)

    def steps(self, shape: DecodeShape, cursor: int) -> int:
        """Steps until the next decision."""
        return min(self.steps_between, shape.slots - cursor)

    def steps_taken(self, longest: int, cursor: int, steps: int) -> int:
        """Of those steps, how many the device does until the longest response has ended."""
        return min(steps, -(-(longest - cursor) // self.check_every) * self.check_every)

    def may_wait(self, shape: DecodeShape, cursor: int) -> bool:
        """Whether a batch comes to where its unfinished samples may wait for those of others.

        One that has become small before goes on.
        """
        return self.leftovers is not None and shape.slots == cursor == self.leftovers.slots

    def fits_leftovers(self, live_BG: np.ndarray) -> bool:
        """Whether a batch's unfinished samples have room there."""
        return self.leftovers is not None and live_BG.sum() <= self.leftovers.prompts

    def simulate(self, *lengths: np.ndarray) -> list[Span]:
        """What `Engine.generate_batches` does with responses of these lengths, within the limit.

        All prompts' caches are `prompt_tokens` wide, which there each batch has its own of.

        Args:
          lengths: [B, G] int tokens of each batch's responses.
        """
        spans, waiting = list[Span](), np.zeros(0, int)
        for length_BG in lengths:
            found, left = self._simulate(self.shapes[0], length_BG, 0)
            spans += found
            if self.leftovers is None:
                continue
            if left is None or len(waiting) + len(left) > self.leftovers.prompts:
                spans += self._simulate_leftovers(waiting)
                waiting = waiting[:0]
            if left is not None:
                waiting = np.concatenate((waiting, left))
        return spans + self._simulate_leftovers(waiting)

    def _simulate_leftovers(self, lengths: np.ndarray) -> list[Span]:
        if self.leftovers is None or not len(lengths):
            return []
        padded = np.pad(lengths, (0, self.leftovers.prompts - len(lengths)))[:, None]
        return self._simulate(self.leftovers, padded, self.leftovers.slots)[0]

    def _simulate(
        self, shape: DecodeShape, lengths: np.ndarray, start: int
    ) -> tuple[list[Span], np.ndarray | None]:
        """The spans of rows that have `start` tokens, and the lengths of those that wait.

        None in their place where too many would have to.
        """
        cursor, spans, left = start, list[Span](), lengths[:0, 0]
        while (live := lengths > cursor).any():
            if not start and self.may_wait(shape, cursor):
                if self.fits_leftovers(live):
                    return spans, lengths[live]
                left = None
            new = self.next_shape(shape, live, cursor) if cursor else shape
            if not new.has_rows_of(shape):
                rows = select_rows(live, new)
                lengths = np.where(rows.used, rows.of(lengths), 0)
            steps = self.steps_taken(int(lengths.max()), cursor, self.steps(new, cursor))
            spans.append(Span(new, cursor, end := cursor + steps))
            shape, cursor = new, end
        return spans, left


def _slots(kv_block: int, limit: int) -> list[int]:
    """Of a sample's caches, one after another."""
    slots = [min(kv_block, limit)]
    while slots[-1] < limit:
        slots.append(min(2 * slots[-1], limit))
    return slots


def _leftovers(whole: Sequence[DecodeShape], prompt_tokens: int, shards: int) -> DecodeShape | None:
    """Where a batch's unfinished samples wait for those of others; None where there is no room.

    It stops in the third-last of its shapes, and as many rows wait as have room at the limit beside
    it: so decoding needs no more memory than a batch needs at the limit.

    Args:
      whole: the shapes of all samples of a batch, of ascending slots.
      prompt_tokens: of each prompt's cache.
      shards: which divide the rows.
    """
    waiting, last = whole[-3], whole[-1]
    beside = last.columns(prompt_tokens) - waiting.columns(prompt_tokens)
    rows = beside // (prompt_tokens + last.slots) // shards * shards
    return DecodeShape(rows, 1, waiting.slots) if rows else None


def leftover_rows(live_BG: np.ndarray, first: int, count: int) -> Rows:
    """Unfinished samples in rows of their own, `count` in all, from row `first`."""
    prompt, sample = np.nonzero(live_BG)
    place = slice(first, first + len(prompt))
    rows = Rows(
        np.zeros(count, np.int32), np.zeros((count, 1), np.int32), np.zeros((count, 1), bool)
    )
    rows.prompt[place], rows.sample[place, 0], rows.used[place] = prompt, sample, True
    return rows


def select_rows(live_BG: np.ndarray, shape: DecodeShape) -> Rows:
    """Which rows of the present shape another one continues with, in their order.

    Where each prompt has a row of its own in both, it stays where it is. So do the samples of rows
    that hold whole groups: the last one may be greedy.
    """
    count = live_BG.sum(axis=1)
    chunks = -(-count // shape.group)
    if shape.prompts == len(live_BG) and chunks.max(initial=0) <= 1:
        chunks = np.ones_like(chunks)
    prompt = np.repeat(np.arange(len(live_BG)), chunks)
    first = shape.group * (np.arange(len(prompt)) - np.repeat(np.cumsum(chunks) - chunks, chunks))
    place, size = first[:, None] + np.arange(shape.group), live_BG.shape[1]
    # Unfinished samples come first where not all have a place.
    order = np.argsort(~live_BG & (shape.group < size), axis=1, kind="stable")
    sample = order[prompt[:, None], np.minimum(place, size - 1)]
    used = live_BG[prompt[:, None], sample] & (place < size)
    missing = shape.prompts - len(prompt)
    return Rows(
        np.pad(prompt, (0, missing)).astype(np.int32),
        np.pad(sample, ((0, missing), (0, 0))).astype(np.int32),
        np.pad(used, ((0, missing), (0, 0))),
    )


@dataclass(frozen=True)
class RolloutUse:
    """How much of what a rollout computed was needed; sums over rollouts.

    Attributes:
      steps: decode steps.
      tokens: tokens that responses have.
      rows: rows of all steps.
      live_columns: tokens of caches that the responses needed to read.
      columns: tokens of caches that were allocated, summed over the steps.
      prompt_tokens: tokens that prompts have.
      prefilled: tokens that were prefilled.
    """

    steps: int = 0
    tokens: int = 0
    rows: int = 0
    live_columns: int = 0
    columns: int = 0
    prompt_tokens: int = 0
    prefilled: int = 0

    @classmethod
    def of(
        cls,
        spans: Sequence[Span],
        length_BG: np.ndarray,
        prompt_length_B: np.ndarray,
        prompt_tokens: int,
        prefilled: int,
    ) -> "RolloutUse":
        """That of one rollout; `prompt_tokens` as in `Schedule`, `prefilled` with padding."""
        length = length_BG.astype(np.int64)
        prompts = prompt_length_B.astype(np.int64) * length.max(axis=1)
        return cls(
            sum(span.steps for span in spans),
            int(length.sum()),
            sum(span.steps * span.shape.samples for span in spans),
            int(prompts.sum() + (length * (length + 1) // 2).sum()),
            sum(span.steps * span.shape.columns(prompt_tokens) for span in spans),
            int(prompt_length_B.sum()),
            prefilled,
        )

    @classmethod
    def of_spans(cls, spans: Sequence[Span], prompt_tokens: int) -> "RolloutUse":
        """That of steps alone, whose tokens count elsewhere."""
        return cls.of(spans, np.zeros((1, 1), int), np.zeros(1, int), prompt_tokens, 0)

    def metrics(self) -> dict[str, float]:
        """The decode steps, and fractions: of rows, cached and prefilled tokens."""
        return {
            "prefill_padding_share": 1 - self.prompt_tokens / max(self.prefilled, 1),
            "decode_steps": float(self.steps),
            "decode_occupancy": self.tokens / max(self.rows, 1),
            "cache_occupancy": self.live_columns / max(self.columns, 1),
        }

    def __add__(self, other: "RolloutUse") -> "RolloutUse":
        mine, theirs = vars(self).values(), vars(other).values()
        return RolloutUse(*(a + b for a, b in zip(mine, theirs, strict=True)))
