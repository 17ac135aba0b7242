"""Batches for training: which records, in what order, on which process.

A step's batch is a function of the stream and the step alone, whatever the number of processes,
workers and threads, so that the pipeline's whole state is one integer.
"""

import itertools
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import grain
import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.processes import end_with_parent
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.processor import Prompt

# A row of a process and its index in the global batch; None where an epoch's last batch lacks it.
Row = tuple[int, Item | None]


@dataclass(frozen=True)
class Batch:
    """This process's rows of a step's global batch.

    Attributes:
      items: b examples with their prompts, which are padded when the shape that they are computed
        in is known.
      index: [b] int32 index of each in the global batch.
    """

    items: tuple[Item, ...]
    index: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Batch":
        """Items with their indices in the global batch, as one value; None is no item."""
        found = [(index, item) for index, item in rows if item is not None]
        return cls(tuple(item for _, item in found), np.array([i for i, _ in found], np.int32))

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(item.prompt for item in self.items)


class _ProcessRows(grain.sources.RandomAccessDataSource):
    """The rows of every global batch that belong to one process, one after another.

    A batch is split into the parts of its optimizer steps, and each process has an equal number of
    rows of each, so that a step trains on the same prompts whatever the number of processes. The
    last batch of an epoch, if it is smaller, is one part; rows that it lacks have no item.
    """

    def __init__(
        self,
        items: grain.MapDataset[Item],
        batch: int,
        update: int,
        process: int,
        processes: int,
        epoch: int | None = None,
    ):
        self.items, self.batch, self.update = items, batch, update
        self.process, self.processes, self.epoch = process, processes, epoch

    def __len__(self) -> int:
        return len(self.items) // self.batch * (self.batch // self.processes)

    def __getitem__(self, index: int) -> Row:
        step, row = divmod(int(index), self.batch // self.processes)
        first, size = self._range(step)
        update = self.update if size == self.batch else size
        rows = update // self.processes
        number = row // rows * update + self.process * rows + row % rows
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
    update: int,
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
      update: prompts an optimizer step, over all processes; divides `batch`.
      start: the first step.
      threads: threads that make items, in each worker.
      workers: processes that make items; 0 makes them in this one.
      process, processes: index of this process, and their number.
      epoch: items after which a batch is cut off, as the last one of an epoch; None is endless.

    Raises:
      UserError: the number of processes does not divide `update` or an epoch's last batch.
    """
    if epoch is not None and epoch % batch % processes:
        raise UserError(
            f"the last {epoch % batch} of {epoch} examples do not divide over {processes} "
            f"processes: set sft.examples={epoch - epoch % batch % processes}."
        )
    if update % processes:
        raise UserError(
            f"the {update} prompts of an optimizer step do not divide over {processes} processes."
        )
    rows = grain.MapDataset.source(_ProcessRows(items, batch, update, process, processes, epoch))
    local_batch = batch // processes
    rows = rows[start * local_batch :]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    if workers:
        made = _Workers(rows, options, workers, local_batch)
        prefetched = grain.experimental.ThreadPrefetchDatasetIterator(made, 1)
        return BatchStream(prefetched, made)
    stream = rows.to_iter_dataset(options)
    stream = stream.batch(local_batch, drop_remainder=True, batch_fn=Batch.of)
    prefetched = grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=1)
    return BatchStream(iter(prefetched))


class BatchStream:
    """An endless iterator over batches; `close` ends its threads and worker processes.

    Args:
      stream: Grain's iterator.
      workers: the processes that make its items, if any do.
    """

    def __init__(self, stream: grain.DatasetIterator[Batch], workers: "_Workers | None" = None):
        self._stream, self._workers = stream, workers

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          UserError: a worker process was killed.
        """
        return next(self._stream)

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()  # first, as the thread that prefetches may wait for one
        self._stream.close()


class _Workers:
    """Batches of rows that processes make in turn, each with a pipe of its own.

    When a process dies, its pipe ends, whatever it was writing. Grain's own workers share queues
    with their reader, which waits for the rest of a row for ever, and at the end of the run again.

    Args:
      rows: of this process.
      options: threads of each worker, and rows that they make ahead.
      workers: processes.
      batch: rows of a batch.
    """

    def __init__(
        self, rows: grain.MapDataset[Row], options: grain.ReadOptions, workers: int, batch: int
    ):
        context, self._batch = multiprocessing.get_context("spawn"), batch
        self._processes, pipes = [], []
        for worker in range(workers):
            mine, theirs = context.Pipe(duplex=False)
            program = cloudpickle.dumps(rows[worker::workers].to_iter_dataset(options))
            process = context.Process(target=_make_rows, args=(theirs, program), daemon=True)
            process.start()
            theirs.close()  # so that the pipe ends with the process
            self._processes.append(process)
            pipes.append(mine)
        self._turns = itertools.cycle(zip(self._processes, pipes, strict=True))

    def __iter__(self) -> "_Workers":
        return self

    def __next__(self) -> Batch:
        return Batch.of([self._row() for _ in range(self._batch)])

    def _row(self) -> Row:
        process, pipe = next(self._turns)
        try:
            made = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            process.join()
            raise _killed(process.exitcode) from None
        if isinstance(made, Exception):
            raise made
        return made

    # What Grain's prefetching asks of an iterator; the step is the pipeline's whole state.
    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        for process in self._processes:
            process.kill()  # it holds nothing, and may wait for its pipe


def _make_rows(pipe: "Connection[Any, Any]", program: bytes) -> None:
    """A worker: writes its rows to its pipe, which holds it back, or the error that ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run ends its workers
    end_with_parent()
    try:
        for row in pickle.loads(program):
            # Of this protocol arrays are copied once.
            pipe.send_bytes(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
    except Exception as error:
        error.add_note(traceback.format_exc())
        with suppress(BrokenPipeError):  # the run has ended
            pipe.send_bytes(_pickled(error))


def _pickled(error: Exception) -> bytes:
    """An error as bytes; of one whose class does not pickle, its text."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # a class's own code, which may raise any
        return pickle.dumps(RuntimeError(error_line(error)))
    return data


def _killed(code: int | None) -> UserError:
    return UserError(
        f"a worker process that makes prompts was killed (exit code {code}; -9 is often the "
        "system, out of memory): lower data.workers or data.threads; the same command then resumes."
    )


def batch_at(
    items: grain.MapDataset[Item],
    batch: int,
    update: int,
    number: int,
    *,
    process: int,
    processes: int,
) -> Batch:
    """Batch `number` of a stream alone, made in this thread; arguments as those of `batches`."""
    rows = _ProcessRows(items, batch, update, process, processes)
    local_batch = batch // processes
    return Batch.of([rows[number * local_batch + i] for i in range(local_batch)])
