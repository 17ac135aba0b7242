"""The Grain pipeline: records -> examples -> prompts, by global index.

Every global index yields an item whatever the number of processes and threads: the task, the
record and every draw follow from (seed, index), and a picture that gives no valid example is
replaced, inside the index, by another one drawn from the index's own generator.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.data.prompts import Processor, Prompt
from spatial_ssrl_jax.data.sources.base import Source
from spatial_ssrl_jax.errors import BadPicture, UserError
from spatial_ssrl_jax.qwen2_5_vl.model import PromptBatch
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.example import Example, Reject, Task
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

_TRIES = 50


@dataclass(frozen=True)
class Skip:
    """A record that gave no example: its name, why, and whether its file was bad."""

    name: str
    reason: str
    bad: bool


@dataclass(frozen=True)
class Item:
    """One example and the prompt made of it.

    Attributes:
      example: question, answer, pictures, truth.
      prompt: tokens, patches and indices.
      skipped: records that were tried before and gave nothing.
    """

    example: Example
    prompt: Prompt
    skipped: tuple[Skip, ...]


@dataclass(frozen=True)
class Batch:
    """This process's part of a step.

    Attributes:
      items: b examples.
      prompts: the same, padded; NumPy arrays.
      index: [b] int32 place of each in the step's global batch.
    """

    items: tuple[Item, ...]
    prompts: PromptBatch
    index: np.ndarray


@dataclass(frozen=True)
class Split:
    """Records of one source, held-out ones apart; the same in every run.

    Attributes:
      train, heldout: record indices.
    """

    train: tuple[int, ...]
    heldout: tuple[int, ...]


def split_records(source: Source, share: float) -> Split:
    """Splits by a hash of each record's name, so that a picture never changes sides.

    At least one record is held out where there are two, and at least one is left for training.
    """
    names = [source.name(i) for i in range(len(source))]
    order = sorted(range(len(names)), key=lambda i: hashlib.sha1(names[i].encode()).digest())
    count = round(share * len(order))
    if share > 0 and len(order) > 1:
        count = min(max(count, 1), len(order) - 1)
    count = min(count, len(order) - 1)
    return Split(tuple(sorted(order[count:])), tuple(sorted(order[:count])))


class MakeItem(grain.transforms.RandomMap):
    """Record index -> `Item`, trying other records of the pool when one gives nothing."""

    def __init__(
        self, source: Source, pool: Sequence[int], task: Task, settings: Any, processor: Processor
    ):
        self.source, self.pool, self.task = source, pool, task
        self.settings, self.processor = settings, processor

    def random_map(self, element: int, rng: np.random.Generator) -> Item:
        skipped, index = [], int(element)
        for _ in range(_TRIES):
            try:
                example = self.task.make(self.source[index], rng, self.settings)
                prompt = self.processor.prompt(
                    f"{example.question} {FORMAT_PROMPT}", example.images
                )
                return Item(example, prompt, tuple(skipped))
            except (Reject, BadPicture) as error:
                bad = isinstance(error, BadPicture)
                skipped.append(Skip(self.source.name(index), str(error), bad))
            index = int(self.pool[rng.integers(len(self.pool))])
        reasons = "; ".join(sorted({skip.reason for skip in skipped})[:3])
        raise UserError(
            f"{self.source.spec} gave no valid {self.task.name} example in {_TRIES} tries "
            f"({reasons}): set tasks.{self.task.name}.weight=0 or use other pictures."
        )


def item_dataset(
    source: Source,
    pool: Sequence[int],
    tasks: dict[str, Any],
    processor: Processor,
    seed: int,
) -> grain.MapDataset:
    """An endless stream of items, mixed by the tasks' weights.

    Args:
      source: where pictures come from.
      pool: record indices to draw from.
      tasks: settings by task name; a weight of 0 leaves the task out.
      processor: makes prompts.
      seed: of shuffling and of every draw.

    Raises:
      UserError: a task with weight needs depth and the source has none.
    """
    parts, weights = [], []
    for number, task in enumerate(TASKS):
        settings = tasks[task.name]
        if settings.weight <= 0:
            continue
        if task.needs_depth and not source.has_depth:
            raise UserError(
                f"the task {task.name} needs depth and {source.spec} has none: "
                f"set --config.tasks.{task.name}.weight=0 or use a source with depth."
            )
        part = grain.MapDataset.source(list(pool)).seed(seed * len(TASKS) + number)
        part = part.shuffle().repeat()
        parts.append(part.random_map(MakeItem(source, pool, task, settings, processor)))
        weights.append(settings.weight)
    return grain.MapDataset.mix(parts, np.array(weights) / np.sum(weights))


class _ProcessRows(grain.sources.RandomAccessDataSource):
    """The rows of every global batch that belong to one process, one after another.

    A batch is cut into blocks (micro-batches), and each process has an equal part of every block,
    so that a micro-batch holds the same prompts whatever the number of processes.
    """

    def __init__(
        self, items: grain.MapDataset, batch: int, block: int, process: int, processes: int
    ):
        self.items, self.batch, self.block = items, batch, block
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return len(self.items) // self.batch * (self.batch // self.processes)

    def __getitem__(self, index: int) -> tuple[int, Item]:
        step, row = divmod(int(index), self.batch // self.processes)
        share = self.block // self.processes
        place = row // share * self.block + self.process * share + row % share
        return place, self.items[step * self.batch + place]


@dataclass(frozen=True)
class Collate:
    """Items with their places -> `Batch`."""

    prompt_buckets: tuple[int, ...]
    window_buckets: tuple[int, ...]

    def __call__(self, rows: Sequence[tuple[int, Item]]) -> Batch:
        places, items = zip(*rows, strict=True)
        prompts = pad_prompts([i.prompt for i in items], self.prompt_buckets, self.window_buckets)
        return Batch(items, prompts, np.array(places, np.int32))


def batches(
    items: grain.MapDataset,
    batch: int,
    block: int,
    collate: Collate,
    *,
    start: int,
    threads: int,
    process: int,
    processes: int,
) -> grain.DatasetIterator:
    """Batches of a stage from step `start` on, made ahead by `threads` threads.

    A step's batch is a function of the items and the step alone, so the pipeline's whole state is
    the number of the next step.

    Args:
      items: the stream.
      batch: prompts a step, over all processes.
      block: prompts a micro-batch, over all processes; divides `batch`.
      collate: pads the items.
      start: the first step.
      threads: threads that make items.
      process, processes: which part of each block is this process's.

    Raises:
      UserError: the number of processes does not divide `block`.
    """
    if block % processes:
        raise UserError(
            f"a micro-batch of {block} prompts does not divide over {processes} processes."
        )
    rows = grain.MapDataset.source(_ProcessRows(items, batch, block, process, processes))
    whole = rows.batch(batch // processes, drop_remainder=True, batch_fn=collate)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2)
    return iter(whole[start:].to_iter_dataset(options))
