"""Batches for training: which records, in what order, on which process.

A step's batch is a function of the stream and the step alone, whatever the number of processes,
workers and threads, so that the pipeline's whole state is one integer.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch

_WORKER_BUFFER = 4  # items each worker process makes ahead


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
    """Items with their places -> `Batch`; as `pad_prompts` takes them."""

    prompt_buckets: tuple[int, ...]
    window_buckets: tuple[int, ...]
    dtype: str = "float32"

    def __call__(self, rows: Sequence[tuple[int, Item]]) -> Batch:
        places, items = zip(*rows, strict=True)
        buckets = self.prompt_buckets, self.window_buckets
        prompts = pad_prompts([i.prompt for i in items], *buckets, self.dtype)
        # Their patches are the larger part of a batch: they are not kept twice.
        items = tuple(dataclasses.replace(item, prompt=None) for item in items)
        return Batch(items, prompts, np.array(places, np.int32))


def batches(
    items: grain.MapDataset,
    batch: int,
    block: int,
    collate: Collate,
    *,
    start: int,
    threads: int,
    workers: int = 0,
    process: int,
    processes: int,
) -> grain.DatasetIterator:
    """Batches of a stage from step `start` on, made ahead; `start` is the pipeline's whole state.

    Args:
      items: the stream.
      batch: prompts a step, over all processes.
      block: prompts a micro-batch, over all processes; divides `batch`.
      collate: pads the items, to the smallest buckets that hold this process's part of a batch.
      start: the first step.
      threads: threads that make items, in each worker.
      workers: processes that make items; 0 makes them in this one.
      process, processes: which part of each block is this process's.

    Raises:
      UserError: the number of processes does not divide `block`.
    """
    if block % processes:
        raise UserError(
            f"a micro-batch of {block} prompts does not divide over {processes} processes."
        )
    rows = grain.MapDataset.source(_ProcessRows(items, batch, block, process, processes))
    share = batch // processes
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    stream = rows[start * share :].to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers ask for flags that only absl.app parses
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, _WORKER_BUFFER))
    stream = stream.batch(share, drop_remainder=True, batch_fn=collate)
    return iter(grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=1))


def batch_at(
    items: grain.MapDataset,
    batch: int,
    block: int,
    collate: Collate,
    number: int,
    *,
    process: int,
    processes: int,
) -> Batch:
    """Batch `number` of a stream alone, made when asked for; arguments as those of `batches`."""
    rows, share = _ProcessRows(items, batch, block, process, processes), batch // processes
    return collate([rows[number * share + i] for i in range(share)])
