"""Arrays that rest in host memory while no program needs them: `optim.offload`."""

from typing import Any

import jax

_HOST, _DEVICE = "pinned_host", "device"


def to_host(tree: Any) -> Any:
    """The arrays in their devices' host memory, cut as they were; frees the devices' copies."""
    return _moved(tree, _HOST)


def to_device(tree: Any) -> Any:
    """The arrays in device memory; those that are there already are the same arrays."""
    return _moved(tree, _DEVICE)


def like(tree: Any, before: Any) -> Any:
    """The arrays where those of `before` are."""
    return jax.tree.map(lambda x, b: jax.device_put(x, b.sharding), tree, before)


def _moved(tree: Any, kind: str) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree)
