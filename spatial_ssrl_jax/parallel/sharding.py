"""Shardings of weights and batches: the table from logical axes to mesh axes, and `Layout`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.parallel.mesh import AXES, AXIS_TYPES, BATCH_AXES
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.layers import Axes
from spatial_ssrl_jax.qwen_vl.lora import NO_LORA, LoraSettings
from spatial_ssrl_jax.qwen_vl.model import Params, abstract_params, param_axes
from spatial_ssrl_jax.qwen_vl.param_tree import flatten_params, select_params, unflatten_params

EMBED_AXIS = "fsdp"  # mesh axis of the model's width while training
# Logical axis -> mesh axes, in each layout; other axes are replicated. The vision tower's inner
# width, 3420, divides only by 4, so only its outer width is sharded.
_BY_TENSOR = {"heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "vocab": "tensor"}

SHARDING_RULES: dict[str, Mapping[str, str | tuple[str, ...]]] = {
    "train": {"batch": BATCH_AXES, "embed": EMBED_AXIS} | _BY_TENSOR,
    "rollout": {"batch": BATCH_AXES} | _BY_TENSOR,
}


@dataclass(frozen=True)
class Layout:
    """How arrays are sharded over a mesh.

    Attributes:
      mesh: with the axes `AXES`.
      rules: the entry of `SHARDING_RULES` that applies.
    """

    mesh: Mesh
    rules: Literal["train", "rollout"] = "train"

    @property
    def batch_shards(self) -> int:
        """Number of shards of the batch axis."""
        return math.prod(self.mesh.shape[a] for a in BATCH_AXES)

    def rollout(self, tensor: int) -> "Layout":
        """The layout for sampling: the same devices in the same order, as `data` x `tensor`.

        Args:
          tensor: number of devices that share one copy of the weights; they are neighbours of one
            process.

        Raises:
          UserError: `tensor` does not divide the devices of every process.
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
        return Layout(Mesh(grid, AXES, axis_types=AXIS_TYPES), "rollout")

    def batch_sharding(self) -> NamedSharding:
        """The sharding of arrays [B, ...]: rows over `BATCH_AXES`."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    def replicated(self) -> NamedSharding:
        """A full copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def param_shardings(
        self, config: QwenVLConfig, lora: LoraSettings = NO_LORA, part: str = ""
    ) -> Params:
        """The sharding of every weight, or of those below `part`; with `lora`, of adapters too.

        Raises:
          UserError: an axis of a weight does not divide by its mesh axis.
        """
        shapes = flatten_params(abstract_params(config, lora))
        axes = flatten_params(param_axes(config, lora))
        flat = {
            path: self.sharding(path, axes[path], leaf.shape)
            for path, leaf in shapes.items()
            if path.startswith(part)
        }
        return unflatten_params(flat)

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
        """The sharding of an array.

        Key/value heads are replicated where there are fewer of them than shards.

        Args:
          name: the array's name, for the error.
          axes: its logical axes; None is replicated.
          shape: its sizes.

        Raises:
          UserError: an axis does not divide by its mesh axes; the message names both.
        """
        spec = []
        for axis, size in zip(axes, shape, strict=True):
            target = SHARDING_RULES[self.rules].get(axis) if axis else None
            shards = math.prod(self.mesh.shape[a] for a in _names(target))
            if axis == "kv_heads" and size % shards and shards % size == 0:
                target, shards = None, 1
            if size % shards:
                section = "mesh" if self.rules == "train" else "rollout"
                named = " x ".join(f"{section}.{a}" for a in _names(target))
                raise UserError(
                    f"{name}: its axis {axis} of {size} does not divide by {named}={shards}."
                )
            spec.append(target if shards > 1 else None)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def put_batch(self, tree: Any) -> Any:
        """NumPy arrays [B / processes, ...] -> global arrays [B, ...]; scalars are replicated.

        Args:
          tree: this process's rows; rows are sharded over `BATCH_AXES`.
        """
        sharding = self.batch_sharding()

        def put(x: np.ndarray) -> jax.Array:
            if np.ndim(x) == 0:
                return jax.device_put(x, self.replicated())
            return jax.make_array_from_process_local_data(sharding, np.asarray(x))

        return jax.tree.map(put, tree)

    def abstract_batch(self, tree: Any, rows: int) -> Any:
        """The `jax.ShapeDtypeStruct`s of what `put_batch` gives for a batch of `rows` in all.

        Args:
          tree: NumPy arrays as those of the batch, of any number of rows.
          rows: B.
        """

        def abstract(x: np.ndarray) -> jax.ShapeDtypeStruct:
            shape, sharding = (), self.replicated()
            if np.ndim(x):
                shape, sharding = (rows, *x.shape[1:]), self.batch_sharding()
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        return jax.tree.map(abstract, tree)


def shard_bytes(tree: Any, itemsize: int | None = None) -> int:
    """Bytes of one device's shards.

    Args:
      tree: sharded arrays or `jax.ShapeDtypeStruct`s.
      itemsize: bytes of a number, in place of those of each dtype.
    """
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * (itemsize or x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
    )


def _names(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if target is None:
        return ()
    return (target,) if isinstance(target, str) else target
