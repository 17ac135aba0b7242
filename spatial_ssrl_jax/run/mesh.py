"""Devices as a mesh, and the one table from logical axes to mesh axes for each layout."""

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


def make_mesh(settings: MeshSettings) -> Mesh:
    """All devices as a mesh with the axes `AXES`.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [settings.data, settings.fsdp, settings.tensor]
    devices = jax.device_count()
    if sizes.count(-1) == 1:
        others = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = max(1, devices // others) if others > 0 else 1
    if min(sizes) < 1 or np.prod(sizes) != devices:
        shape = " x ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
        raise UserError(f"mesh {shape} does not fit {devices} devices: change config.mesh.")
    return jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


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

    def params(self, config: Qwen2_5_VLConfig) -> Params:
        """The sharding of every weight.

        Raises:
          UserError: an axis of a weight does not divide by its mesh axis.
        """
        shapes = traverse_util.flatten_dict(abstract_params(config), sep="/")
        axes = traverse_util.flatten_dict(param_axes(config), sep="/")
        flat = {path: self._weight(path, axes[path], leaf.shape) for path, leaf in shapes.items()}
        return traverse_util.unflatten_dict(flat, sep="/")

    def _weight(self, path: str, axes: tuple, shape: tuple[int, ...]) -> NamedSharding:
        spec = []
        for axis, size in zip(axes, shape, strict=True):
            target = TRAIN_RULES.get(axis)
            parts = self.mesh.shape[target] if target else 1
            if axis == "kv_heads" and size % parts and parts % size == 0:
                target, parts = (
                    None,
                    1,
                )  # fewer key/value heads than parts: each part keeps them all
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


def fetch(tree: Any) -> Any:
    """Global arrays as NumPy on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
