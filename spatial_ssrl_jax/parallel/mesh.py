"""Devices as a mesh, and the one table from logical axes to mesh axes for each layout."""

from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.parallel.compiler import set_compiler_flags

AXES = ("data", "fsdp", "tensor")

BATCH_AXES = ("data", "fsdp")

_TYPES = (jax.sharding.AxisType.Auto,) * len(AXES)


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices, all that there are by default, as a mesh with the axes `AXES`.

    TPU slices that are joined over the data-centre network are along `data`, so that only sums of
    gradients and rollout weights go over it.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` is not cut at slices.
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
        return jax.make_mesh(sizes, AXES, axis_types=_TYPES, devices=devices)
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} must be a multiple of the {slices} slices, for only that axis "
            f"is between them: set --config.mesh.data={slices}."
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
