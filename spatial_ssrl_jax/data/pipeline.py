"""Batches for training: which records, in what order, on which process.

A step's batch is a function of the stream and the step alone, whatever the number of processes,
workers and threads, so that the pipeline's whole state is one integer.
"""

import errno
import multiprocessing
import multiprocessing.connection
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import grain
import numpy as np
from absl import flags

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.processes import end_with_parent
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.processor import Prompt

_WORKER_BUFFER = 4  # items each worker process makes ahead
_WATCH_SECONDS, _GRACE_SECONDS = 1.0, 5.0  # between looks at workers; for Grain to notice a death
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
    def of(cls, rows: Sequence[tuple[int, Item | None]]) -> "Batch":
        """Items with their indices in the global batch, as one value; None is no item."""
        found = [(index, item) for index, item in rows if item is not None]
        return cls(tuple(item for _, item in found), np.array([i for i, _ in found], np.int32))

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(item.prompt for item in self.items)


class _ProcessRows(grain.sources.RandomAccessDataSource):
    """The rows of every global batch that belong to one process, one after another.

    A batch is split into micro-batches, and each process has an equal number of rows of each, so
    that a micro-batch holds the same prompts whatever the number of processes. The last batch of an
    epoch, if it is smaller, is one micro-batch; rows that it lacks have no item.
    """

    def __init__(
        self,
        items: grain.MapDataset[Item],
        batch: int,
        micro_batch: int,
        process: int,
        processes: int,
        epoch: int | None = None,
    ):
        self.items, self.batch, self.micro_batch = items, batch, micro_batch
        self.process, self.processes, self.epoch = process, processes, epoch

    def __len__(self) -> int:
        return len(self.items) // self.batch * (self.batch // self.processes)

    def __getitem__(self, index: int) -> tuple[int, Item | None]:
        step, row = divmod(int(index), self.batch // self.processes)
        first, size = self._range(step)
        micro_batch = self.micro_batch if size == self.batch else size
        rows = micro_batch // self.processes
        number = row // rows * micro_batch + self.process * rows + row % rows
        if number >= size:
            return number, None
        item = self.items[first + number]
        assert item is not None  # only where a stream filters
        return number, item

    def _range(self, step: int) -> tuple[int, int]:
        """Index of a step's first item, and their number."""
        if self.epoch is None:
            return step * self.batch, self.batch
        epoch, step = divmod(step, -(-self.epoch // self.batch))
        done = step * self.batch
        return epoch * self.epoch + done, min(self.batch, self.epoch - done)


class _FirstItems(grain.sources.RandomAccessDataSource):
    """The first items of a stream; a slice of Grain's would have others in each epoch."""

    def __init__(self, items: grain.MapDataset[Item], count: int):
        self.items, self.count = items, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item | None:
        return self.items[index]


def repeated(items: grain.MapDataset[Item], epoch: int, seed: int) -> grain.MapDataset[Item]:
    """The first `epoch` items of a stream again and again, each time in another order."""
    first = grain.MapDataset.source(_FirstItems(items, epoch))
    return first.shuffle(seed=seed % 2**32).repeat()


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
    epoch: int | None = None,
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
      epoch: items after which a batch is cut off, as the last one of an epoch; None is endless.

    Raises:
      UserError: the number of processes does not divide `micro_batch` or an epoch's last batch.
    """
    if epoch is not None and epoch % batch % processes:
        raise UserError(
            f"the last {epoch % batch} of {epoch} examples do not divide over {processes} "
            f"processes: set sft.examples={epoch - epoch % batch % processes}."
        )
    if micro_batch % processes:
        raise UserError(
            f"a micro-batch of {micro_batch} prompts does not divide over {processes} processes."
        )
    rows = grain.MapDataset.source(
        _ProcessRows(items, batch, micro_batch, process, processes, epoch)
    )
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
        return BatchStream(iter(prefetched), has_workers=workers > 0)


class BatchStream:
    """An endless iterator over batches; `close` ends its threads and worker processes.

    Args:
      stream: Grain's iterator.
      has_workers: whether processes make its items.
    """

    def __init__(self, stream: grain.DatasetIterator[Batch], has_workers: bool):
        self._stream, self._has_workers, self._waits_forever = stream, has_workers, False
        self._workers: set[BaseProcess] = set()

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          UserError: a worker process was killed, or cannot start.
        """
        with _explain_worker_errors():
            return self._watched_next() if self._has_workers else next(self._stream)

    def _watched_next(self) -> Batch:
        """The next batch, read in a thread: a worker that is killed while it writes to its pipe
        lets the reader wait for ever."""
        self._note_workers()  # those that have died since are no active children
        results: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        threading.Thread(target=_put_next, args=(self._stream, results), daemon=True).start()
        died = None
        while True:
            try:
                found = results.get(timeout=_WATCH_SECONDS)
            except queue.Empty:
                code, now = self._exit_code(), time.monotonic()
                died = died or (now if code is not None else None)
                if died is not None and now - died >= _GRACE_SECONDS:
                    self._waits_forever = True
                    raise _killed(code) from None
                continue
            self._note_workers()
            if isinstance(found, BaseException):
                raise found
            return found

    def _note_workers(self) -> None:
        self._workers |= set(multiprocessing.active_children())

    def _exit_code(self) -> int | None:
        """The exit code of a worker that was killed, if any was."""
        self._note_workers()
        return next((w.exitcode for w in self._workers if w.exitcode), None)

    def close(self) -> None:
        if not self._waits_forever:
            self._stream.close()  # which waits for its threads
        for worker in self._workers if self._waits_forever else ():
            worker.kill()


def _put_next(
    stream: grain.DatasetIterator[Batch], results: "queue.SimpleQueue[Batch | BaseException]"
) -> None:
    """Puts the next batch, or the error of making it."""
    try:
        results.put(next(stream))
    except BaseException as error:  # raised again by who waits
        results.put(error)


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
        raise _killed(int(code[1])) from error


def _killed(code: int | None) -> UserError:
    return UserError(
        f"a worker process that makes prompts was killed (exit code {code}; -9 is often the "
        "system, out of memory): lower data.workers or data.threads; the same command then resumes."
    )


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
