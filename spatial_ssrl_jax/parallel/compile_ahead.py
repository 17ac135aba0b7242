"""Compiling programs in a thread before they are called.

A call with the same shapes, dtypes and shardings then finds the compiled program in JAX's memory.
"""

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax

from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.config.schema import Ahead


def compiles_ahead(setting: Ahead) -> bool:
    """Whether programs are compiled ahead: `compile.ahead`, where `auto` is on TPUs.

    A CPU compiles with the cores that run the programs. A GPU's compiler times kernels on the
    device, which takes its memory and time.
    """
    return setting == "always" or (setting == "auto" and jax.default_backend() == "tpu")


class CompileAhead:
    """A queue of jobs that compile, and the one thread that does them.

    A program that is called before its turn is compiled by the call.

    Args:
      enabled: do them; else they are left out.
      say: called once with a message where a job fails. The program is then compiled, with the same
        error perhaps, when it is called.
    """

    def __init__(self, enabled: bool, say: Callable[[str], None] = lambda _: None):
        self._pool = ThreadPoolExecutor(1, "compile_ahead") if enabled else None
        self._jobs: dict[Hashable, Future[None]] = {}
        self._say = say

    @property
    def enabled(self) -> bool:
        """Whether jobs are done at all."""
        return self._pool is not None

    @property
    def started(self) -> bool:
        """Whether a job was queued, or a program called."""
        return bool(self._jobs)

    def add(self, key: Hashable, job: Callable[[], object]) -> None:
        """Queues a job that compiles the programs of `key`, once for each key."""
        if self._pool is not None and key not in self._jobs:
            self._jobs[key] = self._pool.submit(self._do, job)

    def claim(self, key: Hashable) -> None:
        """Call it before the programs of `key` are called.

        A job that waits is left out, one that compiles is waited for: else both threads would
        compile the same.
        """
        if self._pool is None:
            return
        job = self._jobs.setdefault(key, Future())
        if not job.cancel():
            wait([job])

    def drop(self) -> None:
        """Leaves out the jobs that wait; they may be queued anew."""
        for key, job in list(self._jobs.items()):
            if not job.cancelled() and job.cancel():  # what is claimed is cancelled and stays
                del self._jobs[key]

    def close(self) -> None:
        """Leaves out the jobs that wait, and returns when the one that compiles is done."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _do(self, job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as error:  # whatever it is, the call itself compiles
            say, self._say = self._say, lambda _: None
            say(f"a program is not compiled ahead ({error_line(error)}), but when it is called")


def compile_abstract(program: jax.stages.Wrapped, *args: Any) -> Any:
    """Compiles a jitted function.

    Args:
      program: the function.
      args: its arguments, arrays as `jax.ShapeDtypeStruct`s with the shardings of the call.

    Returns:
      Its results as `jax.ShapeDtypeStruct`s with the shardings that the compiler chose.
    """
    lowered = program.lower(*args)
    shardings = lowered.compile().output_shardings
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        shardings,
    )


def abstract(tree: Any) -> Any:
    """Arrays as `jax.ShapeDtypeStruct`s with their shardings, which hold no memory."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
