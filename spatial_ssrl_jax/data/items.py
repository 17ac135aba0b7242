"""Examples and their prompts as an endless Grain stream, by index.

Every index yields an item: the task, the part of a mixture, the record and every draw follow from
(seed, index), and a record that gives no valid example is replaced, inside the index, by another
one drawn from the index's own generator.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import jax
import numpy as np

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data.processor import Processor, Prompt, PromptSize
from spatial_ssrl_jax.data.sources import AnySource, QuestionSource, Source
from spatial_ssrl_jax.data.sources.mixture import mixture_parts
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.example import Example, Reject, Size, Task
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

TOO_LONG = "prompt above the largest of data.prompt_buckets or data.window_buckets"
_TRIES = 50


@dataclass(frozen=True)
class SkippedRecord:
    """A record that gave no example: its name, why, and whether its file was bad."""

    name: str
    reason: str
    bad: bool


@dataclass(frozen=True)
class Item:
    """One example and the prompt made of it.

    Attributes:
      example: question, answer, images, truth.
      prompt: tokens, patches and indices; None once it is part of a batch.
      skipped: records that were tried before and gave nothing.
    """

    example: Example
    prompt: Prompt | None
    skipped: tuple[SkippedRecord, ...]


# Grain hands the arrays of a worker's items over in shared memory when it finds them as leaves.
# Pickled with their patches, items fill a worker's pipe, and it cannot be stopped.
for _kind, _arrays in (
    (Item, ("example", "prompt")),
    (Example, ("images",)),
    (Prompt, ("ids", "position", "image_index", "patches", "frame", "coords")),
):
    _others = [f.name for f in dataclasses.fields(_kind) if f.name not in _arrays]
    jax.tree_util.register_dataclass(_kind, _arrays, _others)


class ExampleMaker(Protocol):
    """Makes examples of one task from the records of one source; can be pickled."""

    source: Source | QuestionSource
    task: str

    def sizes(self, index: int) -> list[Size]:
        """Sizes of an example's images before any pixel is read; raises `BadImage`."""
        ...

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """One example; raises `Reject` or `BadImage`."""
        ...


@dataclass(frozen=True)
class ImageExampleMaker:
    """Examples that a task makes of images."""

    source: Source
    maker: Task
    settings: Any

    @property
    def task(self) -> str:
        return self.maker.name

    def sizes(self, index: int) -> list[Size]:
        return self.maker.sizes(self.source.size(index))

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
    """What one part of a source gives for one task.

    Attributes:
      maker: makes examples.
      indices: the part's own record indices to draw from.
      weight: the part's share.
    """

    maker: ExampleMaker
    indices: list[int]
    weight: float


def task_sources(
    source: AnySource, pool: Sequence[int], task: Task, settings: Any
) -> list[TaskSource]:
    """The parts of a source, and their records within `pool`, that a task can draw from."""
    found, wanted = [], set(pool)
    for part in mixture_parts(source):
        indices = [i - part.start for i in part.indices if i in wanted]
        if isinstance(part.source, QuestionSource):
            indices = [i for i in indices if part.source.task(i) == task.name]
            maker = QuestionExampleMaker(part.source, task.name)
        elif task.needs_depth and not part.source.has_depth:
            continue
        else:
            maker = ImageExampleMaker(part.source, task, settings)
        if indices:
            found.append(TaskSource(maker, indices, part.weight))
    return found


class MakeItem(grain.transforms.RandomMap):
    """Record index -> `Item`, trying other records of the pool when one gives nothing.

    Args:
      maker: makes examples of one task from one source.
      pool: indices that are drawn from when one gives nothing.
      processor: makes prompts.
      limit: the largest prompt; a larger one is dropped, and counted as any other skip.
    """

    def __init__(
        self,
        maker: ExampleMaker,
        pool: Sequence[int],
        processor: Processor,
        limit: PromptSize | None = None,
    ):
        self.maker, self.pool, self.processor, self.limit = maker, pool, processor, limit
        self._words = processor.measure((), FORMAT_PROMPT).tokens  # in every prompt

    def random_map(self, element: int, rng: np.random.Generator) -> Item:
        skipped, index = [], int(element)
        for _ in range(_TRIES):
            try:
                return self._item(index, rng, tuple(skipped))
            except (Reject, BadImage) as error:
                bad = isinstance(error, BadImage)
                skipped.append(SkippedRecord(self.maker.source.name(index), str(error), bad))
            index = int(self.pool[rng.integers(len(self.pool))])
        reasons = "; ".join(sorted({skip.reason for skip in skipped})[:3])
        task = self.maker.task
        raise UserError(
            f"{self.maker.source.spec} gave no valid {task} example in {_TRIES} tries "
            f"({reasons}): set tasks.{task}.weight=0 or use other images."
        )

    def _item(
        self, index: int, rng: np.random.Generator, skipped: tuple[SkippedRecord, ...]
    ) -> Item:
        """The item of one record; a prompt that is too long is found before pixels are read."""
        pictures = self.processor.measure(self.maker.sizes(index))
        self._check(PromptSize(pictures.tokens + self._words, pictures.windows))
        example = self.maker(index, rng)
        question = f"{example.question} {FORMAT_PROMPT}"
        sizes = [image.shape[:2] for image in example.images]
        self._check(self.processor.measure(sizes, question))
        return Item(example, self.processor.prompt(question, example.images), skipped)

    def _check(self, extent: PromptSize) -> None:
        if self.limit is None:
            return
        if not _fits(extent, self.limit):
            raise Reject(TOO_LONG)


def item_dataset(
    source: AnySource,
    pool: Sequence[int],
    tasks: dict[str, Any],
    processor: Processor,
    seed: int,
    limit: PromptSize | None = None,
) -> grain.MapDataset:
    """An endless stream of items, mixed by the tasks' weights and the weights of a mixture's parts.

    Args:
      source: where images or questions come from.
      pool: record indices to draw from.
      tasks: settings by task name; a weight of 0 leaves the task out.
      processor: makes prompts.
      seed: of shuffling and of every draw.
      limit: the largest prompt, in tokens and in vision windows.

    Raises:
      UserError: a task with weight needs depth and the source has none, or has no question of it.
    """
    datasets, weights = [], []
    for number, task in enumerate(TASKS):
        settings = tasks[task.name]
        if settings.weight <= 0:
            continue
        parts, shares = [], []
        for place, supply in enumerate(task_sources(source, pool, task, settings)):
            part = grain.MapDataset.source(supply.indices).seed(_seed(seed, number, place))
            transform = MakeItem(supply.maker, supply.indices, processor, limit)
            parts.append(part.shuffle().repeat().random_map(transform))
            shares.append(supply.weight)
        if not parts:
            raise UserError(
                f"{unusable(source, task)}: set --config.tasks.{task.name}.weight=0 or use another "
                "source."
            )
        datasets.append(_mixed(parts, shares))
        weights.append(settings.weight)
    return _mixed(datasets, weights)


def check_fits(
    source: AnySource,
    pool: Sequence[int],
    tasks: dict[str, Any],
    processor: Processor,
    limit: PromptSize,
) -> None:
    """Looks whether any of a task's first images fits the buckets, from sizes alone.

    Args:
      source, pool, tasks, processor, limit: as for `item_dataset`.

    Raises:
      UserError: none of them does, for a task with weight.
    """
    for task in TASKS:
        if tasks[task.name].weight <= 0:
            continue
        extents = []
        for supply in task_sources(source, pool, task, tasks[task.name]):
            extents += _extents(supply, processor)
        if extents and not any(_fits(extent, limit) for extent in extents):
            least = min(extents, key=lambda extent: (extent.tokens, extent.windows))
            raise UserError(
                f"no {task.name} prompt of {source.spec} fits {limit.tokens} tokens and "
                f"{limit.windows} windows (the smallest seen takes {least.tokens} and "
                f"{least.windows}): add a larger one to data.prompt_buckets or "
                "data.window_buckets, or lower data.max_pixels."
            )


def _extents(supply: TaskSource, processor: Processor) -> list[PromptSize]:
    """What the first prompts of a supply take at least: images and the words of every prompt."""
    found = []
    for index in supply.indices[:_TRIES]:
        try:
            found.append(processor.measure(supply.maker.sizes(index), FORMAT_PROMPT))
        except BadImage:
            continue
    return found


def _fits(extent: PromptSize, limit: PromptSize) -> bool:
    return extent.tokens <= limit.tokens and extent.windows <= limit.windows


def _mixed(parts: list[grain.MapDataset], weights: list[float]) -> grain.MapDataset:
    return grain.MapDataset.mix(parts, np.array(weights) / np.sum(weights))


def _seed(seed: int, task: int, part: int) -> int:
    """A seed of its own for each task and each part of a mixture."""
    return (seed * len(TASKS) + task + part * 1_000_003) % 2**32


def unusable(source: AnySource, task: Task) -> str:
    """What a source lacks for a task, as the beginning of a sentence."""
    ready = any(isinstance(part.source, QuestionSource) for part in mixture_parts(source))
    if task.needs_depth and not ready:
        return f"the task {task.name} needs depth and {source.spec} has none"
    return f"the task {task.name} finds nothing in {source.spec}"
