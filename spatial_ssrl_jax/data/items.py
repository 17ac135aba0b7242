"""Examples and their prompts as an endless Grain stream, by index.

Every index yields an item: the task, the part of a mixture, the record and every draw follow from
(seed, index). A record without a valid example is replaced, within the index, by another one drawn
from the index's own generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data.processor import Processor, Prompt, PromptSize
from spatial_ssrl_jax.data.sources import AnySource, QuestionSource
from spatial_ssrl_jax.data.task_sources import (
    ExampleMaker,
    ImageExampleMaker,
    QuestionExampleMaker,
    TaskSource,
    task_sources,
    trained_tasks,
    unusable,
)
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.example import Example, Reject, Tasks
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

TOO_LONG = "prompt above the largest of data.prompt_buckets or data.patch_buckets"
_LARGER = "add a larger one to data.prompt_buckets or data.patch_buckets, or lower data.max_pixels"
_TRIES = 50


class NoExample(UserError):
    """The records tried give no example of a task; the message ends with what to change in a run.

    Attributes:
      cause: the message without that end.
    """

    cause = ""


@dataclass(frozen=True)
class SkippedRecord:
    """A record without an example: its name, the reason, and whether its file is bad."""

    name: str
    reason: str
    bad: bool


@dataclass(frozen=True)
class Item:
    """One example and its prompt.

    Attributes:
      example: question, answer, images, truth.
      prompt: tokens, patches and indices, without padding.
      skipped: records that were tried before, without an example.
    """

    example: Example
    prompt: Prompt
    skipped: tuple[SkippedRecord, ...]


class MakeItem(grain.transforms.RandomMap):
    """Record index -> `Item`, trying other records of the pool when one has no example.

    Args:
      maker: makes examples of one task from one source.
      pool: indices that replacements are drawn from.
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
        self._text_tokens = processor.measure((), FORMAT_PROMPT).tokens  # in every prompt

    # Grain's base declares no type.
    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, element: int, rng: np.random.Generator
    ) -> Item:
        skipped, index = [], int(element)
        for _ in range(_TRIES):
            try:
                return self._item(index, rng, tuple(skipped))
            except (Reject, BadImage) as error:
                bad = isinstance(error, BadImage)
                skipped.append(SkippedRecord(self.maker.source.name(index), str(error), bad))
            index = int(self.pool[int(rng.integers(len(self.pool)))])
        reasons, task = sorted({skip.reason for skip in skipped}), self.maker.task
        fix = "use other images"
        if isinstance(self.maker, ImageExampleMaker):
            fix = f"set tasks.{task}.weight=0 or {fix}"
        spec, why = self.maker.source.spec, "; ".join(reason.rstrip(".") for reason in reasons[:3])
        cause = f"{spec} has no valid {task} example in {_TRIES} tries ({why})"
        error = NoExample(f"{cause}: {_LARGER if reasons == [TOO_LONG] else fix}.")
        error.cause = cause
        raise error

    def _item(
        self, index: int, rng: np.random.Generator, skipped: tuple[SkippedRecord, ...]
    ) -> Item:
        """The item of one record; a prompt that is too long is found before pixels are read."""
        images = self.processor.measure(self.maker.sizes(index))
        self._check(PromptSize(images.tokens + self._text_tokens, images.patches))
        example = self.maker(index, rng)
        question = f"{example.question} {FORMAT_PROMPT}"
        sizes = [image.shape[:2] for image in example.images]
        self._check(self.processor.measure(sizes, question))
        return Item(example, self.processor.prompt(question, example.images), skipped)

    def _check(self, size: PromptSize) -> None:
        if self.limit is not None and not _fits(size, self.limit):
            raise Reject(TOO_LONG)


def item_dataset(
    source: AnySource,
    pool: Sequence[int],
    tasks: Tasks,
    processor: Processor,
    seed: int,
    limit: PromptSize | None = None,
) -> grain.MapDataset[Item]:
    """An endless stream of items, mixed by the tasks' weights and the weights of a mixture's parts.

    Args:
      source: where images or questions come from.
      pool: record indices to draw from.
      tasks: with their settings; a weight of 0 leaves a task out.
      processor: makes prompts.
      seed: of shuffling and of every draw.
      limit: the largest prompt, in tokens and in patches.

    Raises:
      UserError: a task with a weight above 0 finds no record: the source has no depth, or no
        question of it, or all of its records are outside of `pool`.
    """
    streams, weights = [], []
    for number, (task, settings) in enumerate(tasks.items()):
        if settings.weight <= 0:
            continue
        parts, part_weights = [], []
        for n, found in enumerate(task_sources(source, pool, task, settings)):
            records = grain.MapDataset.source(found.indices).seed(_seed(seed, number, n))
            transform = MakeItem(found.maker, found.indices, processor, limit)
            parts.append(records.shuffle().repeat().random_map(transform))
            part_weights.append(found.weight)
        if not parts and task_sources(source, range(len(source)), task, settings):
            raise UserError(
                f"all records of {source.spec} for the task {task.name} are held out: lower "
                "data.heldout_fraction, or use another source."
            )
        if not parts:
            raise UserError(
                f"{unusable(source, task)}: set --config.tasks.{task.name}.weight=0 or use another "
                "source."
            )
        streams.append(_mixed(parts, part_weights))
        weights.append(settings.weight)
    return _mixed(streams, weights)


def question_dataset(
    source: QuestionSource, processor: Processor, seed: int, limit: PromptSize | None = None
) -> grain.MapDataset[Item]:
    """An endless stream of ready-made questions, each once before any comes again.

    Args:
      source: of all tasks.
      processor, seed, limit: as for `item_dataset`.
    """
    indices = list(range(len(source)))
    transform = MakeItem(QuestionExampleMaker(source, "cold-start"), indices, processor, limit)
    records = grain.MapDataset.source(indices).seed(_seed(seed, 0, 0))
    return records.shuffle().repeat().random_map(transform)


def check_fits(
    source: AnySource,
    pool: Sequence[int],
    tasks: Tasks,
    processor: Processor,
    limit: PromptSize,
) -> None:
    """Checks that some of each task's first prompts fit the buckets, from sizes alone.

    Args:
      source, pool, tasks, processor, limit: as for `item_dataset`.

    Raises:
      UserError: none of them does, for a task with a weight above 0.
    """
    for task in trained_tasks(tasks):
        for found in task_sources(source, pool, task, tasks[task]):
            sizes = _min_sizes(found, processor)
            if sizes and not any(_fits(size, limit) for size in sizes):
                smallest = min(sizes, key=lambda size: (size.tokens, size.patches))
                raise UserError(
                    f"no {task.name} prompt of {found.maker.source.spec} fits {limit.tokens} "
                    f"tokens and {limit.patches} patches (the smallest takes {smallest.tokens} "
                    f"and {smallest.patches}): {_LARGER}."
                )


def _min_sizes(source: TaskSource, processor: Processor) -> list[PromptSize]:
    """Lower bounds of the first prompts' sizes: images, and the text that every prompt has."""
    sizes = []
    for index in source.indices[:_TRIES]:
        try:
            sizes.append(processor.measure(source.maker.sizes(index), FORMAT_PROMPT))
        except BadImage:
            continue
    return sizes


def _fits(size: PromptSize, limit: PromptSize) -> bool:
    return size.tokens <= limit.tokens and size.patches <= limit.patches


def _mixed(
    streams: Sequence[grain.MapDataset[Item]], weights: Sequence[float]
) -> grain.MapDataset[Item]:
    return grain.MapDataset.mix(streams, np.array(weights) / np.sum(weights))


def _seed(seed: int, task: int, part: int) -> int:
    """A seed of its own for each task and each part of a mixture."""
    block, place = divmod(task, len(TASKS))  # of extra tasks, apart from another seed's
    return (seed * len(TASKS) + place + part * 1_000_003 + block * 15_485_863) % 2**32
