"""The rows that a rollout decodes, those that have left, and those that wait for other batches'."""

from dataclasses import dataclass, field

import jax
import numpy as np
from jax import Array

from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.rollout.cache import DecodeState, Prefix
from spatial_ssrl_jax.rollout.decode import grow, merge_rows, pad_prefix, select
from spatial_ssrl_jax.rollout.schedule import DecodeShape, Span, leftover_rows, select_rows

Fields = tuple[Array, Array, Array, Array]  # tokens, logprobs, length, finished


@dataclass
class LiveRows:
    """The rows that are decoded, and the results of those that have left.

    Attributes:
      shape: their number, and slots of their caches.
      state: what they have.
      prefix: of their prompts.
      keys: one PRNG key a sample.
      cursor: tokens that each of them has.
      sample: [b, g] int, which of all B·G samples each is; B·G where it is none.
      written: the fields of all samples when rows left last; None before.
      spans: the steps so far.
    """

    shape: DecodeShape
    state: DecodeState[Array]
    prefix: Prefix[Array]
    keys: Array
    cursor: int = 0
    sample: np.ndarray = field(init=False)
    written: Fields | None = None
    spans: list[Span] = field(default_factory=list)

    def __post_init__(self):
        self.sample = np.arange(self.shape.samples).reshape(self.shape.prompts, self.shape.group)
        self._total = self.sample.size

    def write(self) -> Fields:
        """The tokens, log-probabilities, lengths and ends [B, G, …] of all samples."""
        return _write(self.written, self.state, self.sample)

    def resize(self, shape: DecodeShape, live_BG: np.ndarray, layout: Layout | None) -> None:
        """Continues with the live samples in another shape."""
        if not shape.has_rows_of(self.shape):
            self.written = self.write()
            rows = select_rows(live_BG, shape)
            self.state, self.prefix, self.keys = select(
                self.state, self.prefix, self.keys, rows, layout
            )
            self.sample = np.where(rows.used, rows.of(self.sample), self._total)
        if shape.slots > self.shape.slots:
            self.state = grow(self.state, shape.slots - self.shape.slots, layout)
        self.shape = shape


@dataclass
class Leftovers:
    """Unfinished samples of several batches, which all have as many tokens.

    Attributes:
      shape: rows for them, and the slots that they have filled.
      prompt_tokens: of their prompts' caches.
      layout: the sharding of caches; None leaves it to the compiler.
    """

    shape: DecodeShape
    prompt_tokens: int
    layout: Layout | None

    def __post_init__(self):
        self._rows: LiveRows | None = None
        self._samples: list[tuple[int, int]] = []

    def have_room(self, count: int) -> bool:
        """Whether so many more samples fit."""
        return len(self._samples) + count <= self.shape.prompts

    def add(self, batch: int, rows: LiveRows, live_BG: np.ndarray) -> None:
        """Takes the live rows of a batch, whose caches are deleted."""
        chosen = leftover_rows(live_BG, len(self._samples), self.shape.prompts)
        self._samples += [(batch, sample) for sample in rows.sample[live_BG].tolist()]
        state, prefix, keys = select(rows.state, rows.prefix, rows.keys, chosen, self.layout)
        prefix = pad_prefix(prefix, self.prompt_tokens, self.layout)
        if self._rows is None:
            self._rows = LiveRows(self.shape, state, prefix, keys, rows.cursor)
        else:
            mine = self._rows
            mine.state, mine.prefix, mine.keys = merge_rows(
                (mine.state, mine.prefix, mine.keys),
                (state, prefix, keys),
                chosen.used[:, 0],
                self.layout,
            )

    def take(self) -> tuple[LiveRows, list[tuple[int, int]]] | None:
        """Their rows, and the batch and the sample of each, first rows first; None without any."""
        if self._rows is None:
            return None
        found = self._rows, self._samples
        self._rows, self._samples = None, []
        return found


@jax.jit
def _write(written: Fields | None, state: DecodeState[Array], sample_BG: np.ndarray) -> Fields:
    """The fields of all samples, updated at those that are decoded."""
    new = (state.tokens, state.logprobs, state.length, state.finished)
    if written is None:
        return new

    def update(old: Array, x: Array) -> Array:
        flat = old.reshape(-1, *old.shape[2:])
        return flat.at[sample_BG].set(x, mode="drop").reshape(old.shape)

    return jax.tree.map(update, written, new)
