"""`shuffle,flip@folder:A+2*nyu:B`: several sources, with the tasks that each serves and weights.

Parts are joined by `+`. Each may have tasks before an `@` and a weight before a `*`: without tasks
it serves all that it can, without a weight it has 1. The task is drawn first, then a part among
those that serve it, in proportion to their weights.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.fingerprint import hash_texts
from spatial_ssrl_jax.data.sources.base import Source
from spatial_ssrl_jax.data.sources.ssrl81k import QuestionSource
from spatial_ssrl_jax.tasks import TASKS, questions
from spatial_ssrl_jax.tasks.example import Example, Task
from spatial_ssrl_jax.tasks.record import Record

_TASKS, _WEIGHT = r"(?:[\w,\- ]+@\s*)?", r"(?:\d+(?:\.\d*)?\s*\*\s*)?"
_SWAPPED = r"\d+(?:\.\d*)?\s*\*\s*[\w,\- ]+@\s*"  # a weight before tasks
_ALONE = "scenes"  # the kind that needs no argument


@dataclass(frozen=True)
class SpecPart:
    """One part of a mixture's SPEC.

    Attributes:
      spec: of the source alone.
      weight: of the source in the mixture.
      tasks: names of the tasks that it serves; None is all that it can.
    """

    spec: str
    weight: float = 1.0
    tasks: tuple[str, ...] | None = None


@dataclass(frozen=True)
class MixturePart:
    """One source of a mixture, as records `start` to `start + len(source)` of the whole.

    Attributes:
      source: images, or ready-made questions.
      weight: of the source in the mixture.
      start: index of its first record in the whole.
      tasks: names of the tasks that it serves; None is all that it can.
    """

    source: Source | QuestionSource
    weight: float
    start: int
    tasks: tuple[str, ...] | None = None

    @property
    def indices(self) -> range:
        """Its records' indices in the whole."""
        return range(self.start, self.start + len(self.source))

    def serves(self, task: Task[Any]) -> bool:
        """Whether a task draws from it."""
        named = self.tasks is None or task.name in self.tasks
        return named and _can_serve(self.source, task)


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


def _can_serve(source: Source | QuestionSource, task: Task[Any]) -> bool:
    if isinstance(source, QuestionSource):
        return any(question.task == task.name for question in source.questions)
    if task == questions.TASK:
        return False
    if task.needs_distances:
        return source.has_distances
    return source.has_depth or not task.needs_depth


def lacks(source: Source | QuestionSource, task: Task[Any]) -> str:
    """What a source lacks for a task that it cannot serve."""
    if isinstance(source, QuestionSource):
        return "no question of it"
    return "only the order of depths, no distances" if source.has_depth else "no depth"


def mixture_parts(source: Source | QuestionSource | Mixture) -> tuple[MixturePart, ...]:
    """A mixture's parts; any other source is one part with weight 1."""
    return source.parts if isinstance(source, Mixture) else (MixturePart(source, 1.0, 0),)


def source_notes(source: Source | QuestionSource | Mixture) -> list[str]:
    """What the listings of a source's parts leave out, one sentence each, without its full stop."""
    parts = [part.source for part in mixture_parts(source)]
    return [f"{part.spec}: {note}" for part in parts for note in getattr(part, "notes", ())]


def mix(
    spec: str,
    sources: Sequence[tuple[Source | QuestionSource, SpecPart]],
    tasks: Sequence[Task[Any]] = TASKS,
) -> Mixture:
    """Concatenates opened sources with their weights and tasks.

    Args:
      spec: the SPEC of the whole.
      sources: each with its part of the SPEC.
      tasks: that parts may name.

    Raises:
      UserError: a source cannot serve a task that is named before it.
    """
    parts, start, known = [], 0, {task.name: task for task in tasks}
    for source, given in sources:
        for name in given.tasks or ():
            task = known[name]
            if not _can_serve(source, task):
                raise UserError(
                    f"source '{spec}': the task {name} is asked of {given.spec}, which has "
                    f"{lacks(source, task)}: name the task before another source."
                )
        parts.append(MixturePart(source, given.weight, start, given.tasks))
        start += len(source)
    return Mixture(spec, tuple(parts))


def split_spec(
    spec: str, kinds: Sequence[str], tasks: Sequence[Task[Any]] = TASKS
) -> list[SpecPart]:
    """The parts of a mixture's SPEC; any other SPEC is one part.

    A `+` joins only where a kind, perhaps with tasks and a weight, follows, so that paths may hold
    one.

    Args:
      spec: the SPEC.
      kinds: of sources.
      tasks: that parts may name.

    Raises:
      UserError: a weight is 0, or a task is unknown.
    """
    any_kind = rf"(?:(?:{'|'.join(kinds)}):|{_ALONE}(?:\s*\+|$))"
    follows = rf"(?={_TASKS}{_WEIGHT}{any_kind}|{_SWAPPED}{any_kind})"
    known = [task.name for task in tasks]
    return [_part(spec, part, known) for part in re.split(rf"\s*\+\s*{follows}", spec)]


def _part(spec: str, text: str, known: Sequence[str]) -> SpecPart:
    match = re.match(rf"({_TASKS})({_WEIGHT})(.*)", text, re.DOTALL)
    assert match is not None  # each group may be empty
    names, weight, rest = match.groups()
    if re.match(_SWAPPED, text):
        raise UserError(
            f"source '{spec}': in '{text}' the weight comes first: write the tasks before it, as "
            "in depth@2*nyu:PATH."
        )
    weight = weight.replace("*", "").strip()
    if weight and float(weight) <= 0:
        raise UserError(f"source '{spec}': the weight of '{text}' must be above 0.")
    names = names.strip().removesuffix("@")
    tasks = tuple(name.strip() for name in names.split(",")) if names else None
    for name in tasks or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(
                f"source '{spec}': there is no task '{name}'; did you mean '{near}'? Tasks: "
                f"{', '.join(known)}."
            )
    return SpecPart(rest, float(weight) if weight else 1.0, tasks)
