"""Arrays kept in host memory while no program uses them: `optim.offload`."""

from typing import TypeVar

import jax

Tree = TypeVar("Tree")

_HOST, _DEVICE = "pinned_host", "device"


def to_host(tree: Tree) -> Tree:
    """The arrays in their devices' host memory, with the same sharding."""
    return _move(tree, _HOST)


def to_device(tree: Tree) -> Tree:
    """The arrays in device memory; those already there are returned as they are."""
    return _move(tree, _DEVICE)


def move_like(tree: Tree, other: Tree) -> Tree:
    """The arrays in the memory and sharding of the arrays of `other`."""
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), tree, other)


def _move(tree: Tree, kind: str) -> Tree:
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree)
