"""TODO: parallel.collectives."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def local_shards(tree: Any, sharding: NamedSharding | None) -> Any:
    """This process's rows of global arrays, as NumPy; the inverse of `Layout.put_batch`.

    Args:
      tree: arrays with rows in front.
      sharding: how rows are sharded; not needed by a single process.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    tree = jax.jit(lambda x: x, out_shardings=sharding)(tree)

    def rows(x: jax.Array) -> np.ndarray:
        pieces = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])

    return jax.tree.map(rows, tree)


def all_gather(tree: Any) -> Any:
    """NumPy arrays with this process's rows -> with the rows of all, one process after another."""
    if jax.process_count() == 1:
        return tree

    def gather(x: np.ndarray) -> np.ndarray:
        # As bytes: JAX would round what has 64 bits.
        x = np.ascontiguousarray(x)
        rows = x.reshape(len(x), -1).view(np.uint8)
        whole = np.asarray(multihost_utils.process_allgather(rows, tiled=True))
        return whole.view(x.dtype).reshape(-1, *x.shape[1:])

    return jax.tree.map(gather, tree)


def gather_to_host(x: jax.Array) -> np.ndarray:
    """A global array as NumPy on every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def all_sum(value: float) -> float:
    """The sum of every process's value."""
    return float(np.sum(all_gather(np.array([value], np.float64))))


def barrier(what: str) -> None:
    """Returns when every process has come here; `what` names the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def is_primary() -> bool:
    """Whether this process writes the run's files; one does."""
    return jax.process_index() == 0
