"""The device mesh and its axes."""

from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.parallel.compiler import set_compiler_flags

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # that the rows of a batch are sharded over
AXIS_TYPES = (AxisType.Auto,) * len(AXES)


def make_mesh(
    settings: MeshSettings,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] - no stubs
) -> Mesh:
    """The devices, all by default, as a mesh with the axes `AXES`.

    TPU slices that are joined over the data-centre network are along `data`, so that only gradient
    sums and rollout weights cross it.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` is not a multiple of
        the number of slices.
    """
    set_compiler_flags()
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
        return jax.make_mesh(sizes, AXES, axis_types=AXIS_TYPES, devices=devices)
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} must be a multiple of the {slices} slices, since only that "
            f"axis crosses slices: set --config.mesh.data={slices}."
        )
    within = (sizes[0] // slices, *sizes[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices=devices)
    return Mesh(grid, AXES, axis_types=AXIS_TYPES)


def slice_count(mesh: Mesh | AbstractMesh) -> int:
    """TPU slices of a mesh; GPUs of several machines count as one."""
    return _slices(mesh.devices.flat) if isinstance(mesh, Mesh) else 1


def _slices(
    devices: Iterable[jax.Device],  # pyright: ignore[reportInvalidTypeForm] - no stubs
) -> int:
    tpus = [d for d in devices if getattr(d, "platform", "") == "tpu"]
    return len({getattr(d, "slice_index", 0) for d in tpus}) or 1
