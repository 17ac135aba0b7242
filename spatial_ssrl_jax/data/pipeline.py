"""Batches for training: which records, in what order, on which process.

A step's batch is a function of the stream and the step alone, whatever the number of processes,
workers and threads, so that the pipeline's whole state is one integer.
"""

import errno
import multiprocessing
import multiprocessing.connection
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.processor import Prompt

_WORKER_BUFFER = 4  # items each worker process makes ahead
# Arrays go through pipes: shared memory outlives killed processes, and containers have 64 MB of it.
_NO_SHARED_MEMORY = 2**62


@dataclass(frozen=True)
class Batch:
    """This process's rows of a step's global batch.

    Attributes:
      items: b examples with their prompts, which are padded when the shape of their micro-batch is
        known.
      index: [b] int32 index of each in the global batch.
    """

    items: tuple[Item, ...]
    index: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[int, Item]]) -> "Batch":
        """Items with their indices in the global batch, as one value."""
        return cls(tuple(item for _, item in rows), np.array([i for i, _ in rows], np.int32))

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(item.prompt for item in self.items)


class _ProcessRows(grain.sources.RandomAccessDataSource):
    """The rows of every global batch that belong to one process, one after another.

    A batch is split into micro-batches, and each process has an equal number of rows of each, so
    that a micro-batch holds the same prompts whatever the number of processes.
    """

    def __init__(
        self,
        items: grain.MapDataset[Item],
        batch: int,
        micro_batch: int,
        process: int,
        processes: int,
    ):
        self.items, self.batch, self.micro_batch = items, batch, micro_batch
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return len(self.items) // self.batch * (self.batch // self.processes)

    def __getitem__(self, index: int) -> tuple[int, Item]:
        step, row = divmod(int(index), self.batch // self.processes)
        rows = self.micro_batch // self.processes
        number = row // rows * self.micro_batch + self.process * rows + row % rows
        item = self.items[step * self.batch + number]
        assert item is not None  # only where a stream filters
        return number, item


def batches(
    items: grain.MapDataset[Item],
    batch: int,
    micro_batch: int,
    *,
    start: int,
    threads: int,
    workers: int = 0,
    process: int,
    processes: int,
) -> "BatchStream":
    """Batches of a stage from step `start` on, prefetched; `start` is the pipeline's whole state.

    Args:
      items: the stream.
      batch: prompts a step, over all processes.
      micro_batch: prompts a micro-batch, over all processes; divides `batch`.
      start: the first step.
      threads: threads that make items, in each worker.
      workers: processes that make items; 0 makes them in this one.
      process, processes: index of this process, and their number.

    Raises:
      UserError: the number of processes does not divide `micro_batch`.
    """
    if micro_batch % processes:
        raise UserError(
            f"a micro-batch of {micro_batch} prompts does not divide over {processes} processes."
        )
    rows = grain.MapDataset.source(_ProcessRows(items, batch, micro_batch, process, processes))
    local_batch = batch // processes
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    stream = rows[start * local_batch :].to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read flags that only absl.app parses
            flags.FLAGS.mark_as_parsed()
        through_pipes = grain.experimental.DatasetOptions(min_shm_size=_NO_SHARED_MEMORY)
        stream = grain.experimental.WithOptionsIterDataset(stream, through_pipes)
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(workers, _WORKER_BUFFER), worker_init_fn=end_with_parent
        )
    stream = stream.batch(local_batch, drop_remainder=True, batch_fn=Batch.of)
    prefetched = grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=1)
    with _explain_worker_errors():
        return BatchStream(iter(prefetched))


class BatchStream:
    """An endless iterator over batches; `close` ends its threads and worker processes.

    Args:
      stream: Grain's iterator.
    """

    def __init__(self, stream: grain.DatasetIterator[Batch]):
        self._stream = stream

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          UserError: a worker process was killed, or cannot start.
        """
        with _explain_worker_errors():
            return next(self._stream)

    def close(self) -> None:
        self._stream.close()


@contextmanager
def _explain_worker_errors() -> Iterator[None]:
    """Turns an error of worker processes into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename:
            raise
        raise UserError(
            "/dev/shm is full, so that no worker process can start: free space there, or set "
            "data.workers=0."
        ) from error
    except RuntimeError as error:
        code = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        if code is None:
            raise
        raise UserError(
            f"a worker process that makes prompts was killed (exit code {code[1]}; -9 is often "
            "the system, out of memory): lower data.workers or data.threads; the same command "
            "then resumes."
        ) from error


def end_with_parent(worker: int = 0, workers: int = 1) -> None:
    """Ends this worker process as soon as its parent has ended, however it did."""
    parent = multiprocessing.parent_process()

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def batch_at(
    items: grain.MapDataset[Item],
    batch: int,
    micro_batch: int,
    number: int,
    *,
    process: int,
    processes: int,
) -> Batch:
    """Batch `number` of a stream alone, made in this thread; arguments as those of `batches`."""
    rows = _ProcessRows(items, batch, micro_batch, process, processes)
    local_batch = batch // processes
    return Batch.of([rows[number * local_batch + i] for i in range(local_batch)])
