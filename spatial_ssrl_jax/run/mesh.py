"""Devices as a mesh, and the one table from logical axes to mesh axes for each layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spatial_ssrl_jax.config import MeshSettings
from spatial_ssrl_jax.errors import UserError
from spatial_ssrl_jax.qwen2_5_vl.config import Qwen2_5_VLConfig
from spatial_ssrl_jax.qwen2_5_vl.lora import NO_LORA, LoraSettings
from spatial_ssrl_jax.qwen2_5_vl.model import Params, abstract_params, param_axes

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# Logical axis of a weight -> mesh axis while training. What is absent is replicated.
TRAIN_RULES = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "vocab": "tensor",
}


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices, all that there are by default, as a mesh with the axes `AXES`.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [settings.data, settings.fsdp, settings.tensor]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if sizes.count(-1) == 1:
        others = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = max(1, count // others) if others > 0 else 1
    if min(sizes) < 1 or np.prod(sizes) != count:
        shape = " x ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
        raise UserError(f"mesh {shape} does not fit {count} devices: change config.mesh.")
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)


@dataclass(frozen=True)
class Layout:
    """Where arrays lie on a mesh."""

    mesh: Mesh

    @property
    def batch_shards(self) -> int:
        """Parts that the batch axis is cut into."""
        return int(np.prod([self.mesh.shape[a] for a in BATCH]))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def params(self, config: Qwen2_5_VLConfig, lora: LoraSettings = NO_LORA) -> Params:
        """The sharding of every weight; with `lora`, of adapters too.

        Raises:
          UserError: an axis of a weight does not divide by its mesh axis.
        """
        shapes = traverse_util.flatten_dict(abstract_params(config, lora), sep="/")
        axes = traverse_util.flatten_dict(param_axes(config, lora), sep="/")
        flat = {path: self._weight(path, axes[path], leaf.shape) for path, leaf in shapes.items()}
        return traverse_util.unflatten_dict(flat, sep="/")

    def abstract(self, config: Qwen2_5_VLConfig, lora: LoraSettings = NO_LORA) -> Params:
        """Every weight's shape and sharding, float32, to restore one."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract_params(config, lora),
            self.params(config, lora),
        )

    def _weight(self, path: str, axes: tuple, shape: tuple[int, ...]) -> NamedSharding:
        spec = []
        for axis, size in zip(axes, shape, strict=True):
            target = TRAIN_RULES.get(axis)
            parts = self.mesh.shape[target] if target else 1
            if axis == "kv_heads" and size % parts and parts % size == 0:
                target, parts = None, 1  # fewer heads than parts: each part keeps them all
            if size % parts:
                raise UserError(
                    f"{path}: its axis {axis} of {size} does not divide by mesh.{target}={parts}."
                )
            spec.append(target if parts > 1 else None)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def put_batch(self, tree: Any) -> Any:
        """Host arrays with this process's rows -> global arrays, rows sharded over `BATCH`."""
        sharding = NamedSharding(self.mesh, PartitionSpec(BATCH))

        def put(x: np.ndarray) -> jax.Array:
            if np.ndim(x) == 0:
                return jax.device_put(x, self.replicated())
            return jax.make_array_from_process_local_data(sharding, np.asarray(x))

        return jax.tree.map(put, tree)


def own_rows(tree: Any, sharding: NamedSharding | None) -> Any:
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


def gather_rows(tree: Any) -> Any:
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


def gather_whole(x: jax.Array) -> np.ndarray:
    """A global array as NumPy on every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def total(value: float) -> float:
    """The sum of every process's value."""
    return float(np.sum(gather_rows(np.array([value], np.float64))))


def wait_for_all(what: str) -> None:
    """Returns when every process has come here; `what` names the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def is_writer() -> bool:
    """Whether this process writes the run's files; one does."""
    return jax.process_index() == 0
