"""Moving data between processes: gathers and sums of host values, and barriers."""

import functools
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jax.stages import Wrapped

Tree = TypeVar("Tree")


def local_shards(tree: Any, sharding: Sharding | None) -> Any:
    """This process's rows of global arrays; the inverse of `Layout.put_batch`.

    Args:
      tree: `jax.Array`s [B, ...] over all processes.
      sharding: how their rows are sharded; not needed by a single process.

    Returns:
      The same tree of NumPy arrays [B / processes, ...].
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    if sharding is None:
        raise ValueError("several processes need the sharding of the rows")

    def rows(x: jax.Array) -> np.ndarray:
        shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

    return jax.tree.map(rows, _reshard(sharding)(tree))


@functools.cache
def _reshard(sharding: Sharding) -> Wrapped:
    """One function for each sharding, so that equal shapes compile once."""
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def all_gather(tree: Tree) -> Tree:
    """NumPy arrays [B, ...] of this process -> [processes * B, ...], in the order of processes."""
    if jax.process_count() == 1:
        return tree

    def gather(x: np.ndarray) -> np.ndarray:
        # As bytes: JAX would round 64-bit values.
        x = np.ascontiguousarray(x)
        rows = x.reshape(len(x), -1).view(np.uint8)
        whole = np.asarray(multihost_utils.process_allgather(rows, tiled=True))
        return whole.view(x.dtype).reshape(len(whole), *x.shape[1:])

    return jax.tree.map(gather, tree)


def gather_to_host(x: jax.Array) -> np.ndarray:
    """A global array as NumPy on every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def all_sum(value: float) -> float:
    """The sum of every process's value."""
    return float(np.sum(all_gather(np.array([value], np.float64))))


def barrier(name: str) -> None:
    """Returns once every process has called it with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def is_primary() -> bool:
    """Whether this is the one process that writes the run's files."""
    return jax.process_index() == 0
