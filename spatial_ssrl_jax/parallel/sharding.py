"""TODO: parallel.sharding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.parallel.mesh import _TYPES, AXES, BATCH_AXES
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.layers import Axes
from spatial_ssrl_jax.qwen_vl.lora import NO_LORA, LoraSettings
from spatial_ssrl_jax.qwen_vl.model import Params, abstract_params, param_axes
from spatial_ssrl_jax.qwen_vl.param_tree import select_params

# Logical axis -> mesh axes, in each layout. What is absent is replicated. The vision tower's inner
# width, 3420, divides by 4 alone, so only its outer one is cut.
EMBED_AXIS = "fsdp"  # mesh axis of the model's width while training
_BY_TENSOR = {"heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "vocab": "tensor"}

SHARDING_RULES = {
    "train": {"batch": BATCH_AXES, "embed": EMBED_AXIS} | _BY_TENSOR,
    "rollout": {"batch": BATCH_AXES} | _BY_TENSOR,
}


@dataclass(frozen=True)
class Layout:
    """Where arrays are on a mesh.

    Attributes:
      mesh: with the axes `AXES`.
      rules: which of `SHARDING_RULES` holds: `train` or `rollout`.
    """

    mesh: Mesh
    rules: str = "train"

    @property
    def batch_shards(self) -> int:
        """Parts that the batch axis is cut into."""
        return math.prod(self.mesh.shape[a] for a in BATCH_AXES)

    def rollout(self, tensor: int) -> "Layout":
        """The same devices in the same order as `data` x `tensor`, for sampling.

        Args:
          tensor: devices that share one copy of the weights; neighbours, of one process.

        Raises:
          UserError: the devices cannot be cut so.
        """
        devices = self.mesh.devices
        if devices.size % tensor:
            raise UserError(f"rollout.tensor={tensor} must divide the {devices.size} devices.")
        if devices.size // jax.process_count() % tensor:
            raise UserError(
                f"rollout.tensor={tensor} must divide the "
                f"{devices.size // jax.process_count()} devices of a process."
            )
        grid = devices.reshape(devices.size // tensor, 1, tensor)
        return Layout(Mesh(grid, AXES, axis_types=_TYPES), "rollout")

    def batch_sharding(self) -> NamedSharding:
        """Where the rows of a batch are."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def param_shardings(
        self, config: QwenVLConfig, lora: LoraSettings = NO_LORA, part: str = ""
    ) -> Params:
        """The sharding of every weight, or of those below `part`; with `lora`, of adapters too.

        Raises:
          UserError: an axis of a weight does not divide by its mesh axis.
        """
        shapes = traverse_util.flatten_dict(abstract_params(config, lora), sep="/")
        axes = traverse_util.flatten_dict(param_axes(config, lora), sep="/")
        flat = {
            path: self.sharding(path, axes[path], leaf.shape)
            for path, leaf in shapes.items()
            if path.startswith(part)
        }
        return traverse_util.unflatten_dict(flat, sep="/")

    def abstract_params(
        self, config: QwenVLConfig, lora: LoraSettings = NO_LORA, part: str = ""
    ) -> Params:
        """The shape and sharding of every weight, or of those below `part`, float32."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            select_params(abstract_params(config, lora), lambda path: path.startswith(part)),
            self.param_shardings(config, lora, part),
        )

    def sharding(self, name: str, axes: Axes, shape: Sequence[int]) -> NamedSharding:
        """Where an array of these logical axes is.

        Fewer key/value heads than parts are replicated: each part keeps them all.

        Raises:
          UserError: an axis does not divide by the mesh axes that it is cut over; it names both.
        """
        spec = []
        for axis, size in zip(axes, shape, strict=True):
            target = SHARDING_RULES[self.rules].get(axis)
            parts = math.prod(self.mesh.shape[a] for a in _names(target))
            if axis == "kv_heads" and size % parts and parts % size == 0:
                target, parts = None, 1
            if size % parts:
                section = "mesh" if self.rules == "train" else "rollout"
                named = " x ".join(f"{section}.{a}" for a in _names(target))
                raise UserError(
                    f"{name}: its axis {axis} of {size} does not divide by {named}={parts}."
                )
            spec.append(target if parts > 1 else None)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def put_batch(self, tree: Any) -> Any:
        """Host arrays with this process's rows -> global arrays, rows sharded over `BATCH_AXES`."""
        sharding = self.batch_sharding()

        def put(x: np.ndarray) -> jax.Array:
            if np.ndim(x) == 0:
                return jax.device_put(x, self.replicated())
            return jax.make_array_from_process_local_data(sharding, np.asarray(x))

        return jax.tree.map(put, tree)


def _names(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if target is None:
        return ()
    return (target,) if isinstance(target, str) else target
