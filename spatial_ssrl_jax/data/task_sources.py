"""What a task's examples are made of: the records of each part of a source that can serve it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.sources import AnySource, QuestionSource, Source
from spatial_ssrl_jax.data.sources.mixture import mixture_parts
from spatial_ssrl_jax.tasks import questions
from spatial_ssrl_jax.tasks.example import Example, Size, Task, Tasks, TaskSettings


class ExampleMaker(Protocol):
    """Makes examples of one task from the records of one source; can be pickled."""

    @property
    def source(self) -> Source | QuestionSource:
        """Where the records come from."""
        ...

    @property
    def task(self) -> str:
        """The task's name."""
        ...

    def sizes(self, index: int) -> list[Size]:
        """Sizes of the example's images, from headers alone; raises `BadImage`."""
        ...

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """One example; raises `Reject` or `BadImage`."""
        ...


@dataclass(frozen=True)
class ImageExampleMaker:
    """Examples that a task builds from images."""

    source: Source
    maker: Task[Any]
    settings: TaskSettings

    @property
    def task(self) -> str:
        return self.maker.name

    def sizes(self, index: int) -> list[Size]:
        return self.maker.sizes(self.source.size(index), self.settings)

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        return self.maker.make(self.source[index], rng, self.settings)


@dataclass(frozen=True)
class QuestionExampleMaker:
    """Ready-made questions of one task."""

    source: QuestionSource
    task: str

    def sizes(self, index: int) -> list[Size]:
        return self.source.sizes(index)

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        return self.source[index]


@dataclass(frozen=True)
class TaskSource:
    """The records of one part of a source for one task.

    Attributes:
      maker: makes examples.
      indices: the part's own record indices to draw from.
      weight: of the part in the mixture.
    """

    maker: ExampleMaker
    indices: list[int]
    weight: float


def task_sources(
    source: AnySource, pool: Sequence[int], task: Task[Any], settings: TaskSettings
) -> list[TaskSource]:
    """The parts of a source, and their records within `pool`, that a task can draw from."""
    found, wanted = [], set(pool)
    maker: ExampleMaker
    for part in mixture_parts(source):
        if not part.serves(task):
            continue
        indices = [i - part.start for i in part.indices if i in wanted]
        if isinstance(part.source, QuestionSource):
            indices = [i for i in indices if part.source.task(i) == task.name]
            maker = QuestionExampleMaker(part.source, task.name)
        else:
            maker = ImageExampleMaker(part.source, task, settings)
        if indices:
            found.append(TaskSource(maker, indices, part.weight))
    return found


def source_shares(sources: Sequence[TaskSource]) -> dict[str, float]:
    """The fraction of a task's examples from each source, by its SPEC."""
    total, shares = sum(source.weight for source in sources), dict[str, float]()
    for source in sources:
        spec = source.maker.source.spec
        shares[spec] = shares.get(spec, 0.0) + source.weight / total
    return shares


def tasks_for(source: AnySource, tasks: Tasks) -> Tasks:
    """The tasks, those that a source is not for with weight 0.

    Questions of one's own are a task of `questions:` alone, and all others of everything else.
    """
    own = [
        isinstance(part.source, QuestionSource) and part.serves(questions.TASK)
        for part in mixture_parts(source)
    ]
    fits = {task: any(own) if task is questions.TASK else not all(own) for task in tasks}
    return {
        task: settings if fits[task] else dataclasses.replace(settings, weight=0.0)
        for task, settings in tasks.items()
    }


def trained_tasks(tasks: Tasks) -> list[Task[Any]]:
    """The tasks with a weight in the mixture."""
    return [task for task, settings in tasks.items() if settings.weight > 0]


def check_served(source: AnySource, tasks: Tasks) -> None:
    """Checks that each part of a source serves one of the tasks with a weight above 0.

    Raises:
      UserError: one serves none, or no task that the source is for has a weight.
    """
    if not trained_tasks(tasks):
        raise UserError(
            f"every task has weight 0 of those that {source.spec} is for: give at least one "
            "tasks.NAME.weight above 0."
        )
    for part in mixture_parts(source):
        if not any(part.serves(task) for task in trained_tasks(tasks)):
            names = ", ".join(task.name for task in trained_tasks(tasks))
            raise UserError(
                f"{part.source.spec} in {source.spec} serves none of the tasks that train "
                f"({names}): leave it out, or name other tasks before its @."
            )


def unusable(source: AnySource, task: Task[Any]) -> str:
    """Why a task finds no record in a source, as the beginning of a sentence."""
    parts = mixture_parts(source)
    ready = any(isinstance(part.source, QuestionSource) for part in parts)
    if all(part.tasks is not None and task.name not in part.tasks for part in parts):
        return f"no source in {source.spec} is for the task {task.name}"
    if task.needs_depth and not ready and not source.has_depth:
        return f"the task {task.name} needs depth and {source.spec} has none"
    if task.needs_distances and not ready and not any(p.source.has_distances for p in parts):
        return f"the task {task.name} needs distances and {source.spec} has only orders of depths"
    return f"the task {task.name} finds no record in {source.spec}"
