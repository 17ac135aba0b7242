"""Devices as a mesh, and the one table from logical axes to mesh axes for each layout."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spatial_ssrl_jax.config import MeshSettings
from spatial_ssrl_jax.errors import UserError
from spatial_ssrl_jax.qwen2_5_vl.config import Qwen2_5_VLConfig
from spatial_ssrl_jax.qwen2_5_vl.layers import Axes
from spatial_ssrl_jax.qwen2_5_vl.lora import NO_LORA, LoraSettings
from spatial_ssrl_jax.qwen2_5_vl.model import Params, abstract_params, param_axes
from spatial_ssrl_jax.qwen2_5_vl.tree import select

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# Logical axis -> mesh axes, in each layout. What is absent is replicated. The vision tower's inner
# width, 3420, divides by 4 alone, so only its outer one is cut.
_BY_TENSOR = {"heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "vocab": "tensor"}
RULES = {
    "train": {"batch": BATCH, "embed": "fsdp"} | _BY_TENSOR,
    "rollout": {"batch": BATCH} | _BY_TENSOR,
}


_TYPES = (jax.sharding.AxisType.Auto,) * len(AXES)


# Products with weights that are cut over chips are one gather and one product. By itself the
# compiler makes as many small ones as there are chips and sums them up: at a micro-batch's sizes
# all its activations are then read and written at every one of them.
_TPU_OPTION = "--xla_jf_spmd_threshold_for_windowed_einsum_mib"


# What the GPU's compiler is told, in a plan as well.
# - Products are cuBLAS's, with bias and residual added inside. It would try its own Triton kernels
#   beside them and leave those sums outside: on an H200 two kernels of 3 us in each layer of a
#   decode step, whose 36 layers then took 5.43 ms in place of 5.16. Where there is no GPU to try
#   them on, it may choose one that does not exist.
# - A product is worked out once. Where a scan over layers keeps one, it would let cuBLAS write to
#   the stack, and work the same product out again for the layer itself: a fifth of what the 3B's
#   update multiplies, with `remat=dots`.
GPU_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_enable_dynamic_slice_fusion": False,
}


def tell_compilers() -> None:
    """Sets options of the TPU's and of the GPU's compiler, before JAX looks for devices.

    A user's own stay; the GPU's are set where JAX has a CUDA plugin.
    """
    _tell("LIBTPU_INIT_ARGS", _TPU_OPTION, "1000000")
    if any("cuda" in plugin.name for plugin in entry_points(group="jax_plugins")):
        for option, value in GPU_OPTIONS.items():
            _tell("XLA_FLAGS", f"--{option}", str(value).lower())


def _tell(variable: str, option: str, value: str) -> None:
    given = os.environ.get(variable, "").split()
    in_a_file = given and not given[0].startswith("-")
    if not in_a_file and all(word.split("=")[0] != option for word in given):
        os.environ[variable] = " ".join([*given, f"{option}={value}"])


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices, all that there are by default, as a mesh with the axes `AXES`.

    TPU slices that are joined over the data-centre network lie along `data`, so that only sums of
    gradients and rollout weights go over it.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` is not cut at slices.
    """
    tell_compilers()
    sizes = [settings.data, settings.fsdp, settings.tensor]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if sizes.count(-1) == 1:
        others = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = max(1, count // others) if others > 0 else 1
    if min(sizes) < 1 or np.prod(sizes) != count:
        shape = " x ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
        raise UserError(f"mesh {shape} does not fit {count} devices: change config.mesh.")
    slices = _slices(devices)
    if slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=_TYPES, devices=devices)
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} must be a multiple of the {slices} slices, for only that axis "
            f"lies between them: set --config.mesh.data={slices}."
        )
    within = (sizes[0] // slices, *sizes[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices=devices)
    return Mesh(grid, AXES, axis_types=_TYPES)


def slice_count(mesh: Mesh) -> int:
    """TPU slices of a mesh; GPUs of several machines count as one."""
    return _slices(mesh.devices.flat)


def _slices(devices: Iterable[jax.Device]) -> int:
    tpus = [d for d in devices if getattr(d, "platform", "") == "tpu"]
    return len({getattr(d, "slice_index", 0) for d in tpus}) or 1


@dataclass(frozen=True)
class Layout:
    """Where arrays lie on a mesh.

    Attributes:
      mesh: with the axes `AXES`.
      rules: which of `RULES` holds: `train` or `rollout`.
    """

    mesh: Mesh
    rules: str = "train"

    @property
    def batch_shards(self) -> int:
        """Parts that the batch axis is cut into."""
        return math.prod(self.mesh.shape[a] for a in BATCH)

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

    def rows(self) -> NamedSharding:
        """Where the rows of a batch lie."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def params(
        self, config: Qwen2_5_VLConfig, lora: LoraSettings = NO_LORA, part: str = ""
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

    def abstract(
        self, config: Qwen2_5_VLConfig, lora: LoraSettings = NO_LORA, part: str = ""
    ) -> Params:
        """The shape and sharding of every weight, or of those below `part`, float32."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            select(abstract_params(config, lora), lambda path: path.startswith(part)),
            self.params(config, lora, part),
        )

    def sharding(self, name: str, axes: Axes, shape: Sequence[int]) -> NamedSharding:
        """Where an array of these logical axes lies.

        Fewer key/value heads than parts are replicated: each part keeps them all.

        Raises:
          UserError: an axis does not divide by the mesh axes that it is cut over; it names both.
        """
        spec = []
        for axis, size in zip(axes, shape, strict=True):
            target = RULES[self.rules].get(axis)
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
        """Host arrays with this process's rows -> global arrays, rows sharded over `BATCH`."""
        sharding = self.rows()

        def put(x: np.ndarray) -> jax.Array:
            if np.ndim(x) == 0:
                return jax.device_put(x, self.replicated())
            return jax.make_array_from_process_local_data(sharding, np.asarray(x))

        return jax.tree.map(put, tree)


def _names(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if target is None:
        return ()
    return (target,) if isinstance(target, str) else target


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
