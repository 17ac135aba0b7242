"""`2*nyu:A+folder:B`: several sources with weights.

Parts are joined by `+`, each perhaps with a weight before a `*`; it is 1 where none is given. A
task draws from the parts that it can use, in proportion to their weights.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.fingerprint import hash_texts
from spatial_ssrl_jax.data.sources.base import Source
from spatial_ssrl_jax.data.sources.ssrl81k import QuestionSource
from spatial_ssrl_jax.tasks.example import Example
from spatial_ssrl_jax.tasks.record import Record

_WEIGHT = r"(?:\d+(?:\.\d*)?\*)?"


@dataclass(frozen=True)
class MixturePart:
    """One source of a mixture, as records `start` to `start + len(source)` of the whole.

    Attributes:
      source: images, or ready-made questions.
      weight: of the source in the mixture.
      start: index of its first record in the whole.
    """

    source: Source | QuestionSource
    weight: float
    start: int

    @property
    def indices(self) -> range:
        """Its records' indices in the whole."""
        return range(self.start, self.start + len(self.source))


@dataclass(frozen=True)
class Mixture:
    """Sources one after another.

    Attributes:
      spec: the SPEC as the user wrote it.
      parts: its sources.
    """

    spec: str
    parts: tuple[MixturePart, ...]

    @property
    def has_depth(self) -> bool:
        return any(part.source.has_depth for part in self.parts)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(path for part in self.parts for path in part.source.inputs)

    def fingerprint(self) -> str:
        return hash_texts(part.source.fingerprint() for part in self.parts)

    def __len__(self) -> int:
        return sum(len(part.source) for part in self.parts)

    def name(self, index: int) -> str:
        part = self._part(index)
        return part.source.name(index - part.start)

    def __getitem__(self, index: int) -> Record | Example:
        part = self._part(index)
        return part.source[index - part.start]

    def _part(self, index: int) -> MixturePart:
        for part in self.parts:
            if index in part.indices:
                return part
        raise IndexError(index)


def mixture_parts(source: Source | QuestionSource | Mixture) -> tuple[MixturePart, ...]:
    """A mixture's parts; any other source is one part with weight 1."""
    return source.parts if isinstance(source, Mixture) else (MixturePart(source, 1.0, 0),)


def mix(spec: str, sources: Sequence[tuple[Source | QuestionSource, float]]) -> Mixture:
    """Concatenates opened sources with their weights."""
    parts, start = [], 0
    for source, weight in sources:
        parts.append(MixturePart(source, weight, start))
        start += len(source)
    return Mixture(spec, tuple(parts))


def split_spec(spec: str, kinds: Sequence[str]) -> list[tuple[str, float]]:
    """The SPECs of a mixture with their weights; any other SPEC alone, with weight 1.

    A `+` joins only where a kind, perhaps with a weight, follows, so that paths may hold one.

    Raises:
      UserError: a weight is 0.
    """
    follows = rf"(?={_WEIGHT}(?:{'|'.join(kinds)})(?::|\+|$))"
    return list(_weighted(spec, re.split(rf"\s*\+\s*{follows}", spec)))


def _weighted(spec: str, parts: list[str]) -> Iterator[tuple[str, float]]:
    for part in parts:
        match = re.match(_WEIGHT, part)
        given = match[0] if match else ""
        weight = float(given[:-1]) if given else 1.0
        if weight <= 0:
            raise UserError(f"source '{spec}': the weight of '{part}' must be above 0.")
        yield part.removeprefix(given), weight
