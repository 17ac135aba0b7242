"""Topologies to compile for without their devices: TPU slices or a GPU by name, or this CPU."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.parallel.compiler import GPU_OPTIONS, set_compiler_flags
from spatial_ssrl_jax.perf.device_specs import DeviceSpec, device_spec
from spatial_ssrl_jax.planning.gpus import GPUS, gpu_devices

# Name of a TPU -> axes of its torus, and gcloud's accelerator type of a slice of n chips.
_TPUS = {
    "v5e": (2, lambda n: f"v5litepod-{n}"),
    "v6e": (2, lambda n: f"v6e-{n}"),
    "v5p": (3, lambda n: f"v5p-{2 * n}"),  # it counts cores
}


@dataclass(frozen=True)
class Topology:
    """What programs are compiled for.

    Attributes:
      name: as the user wrote it.
      devices: for the compiler alone, or real ones.
      spec: peak rates of one device; None where not known.
      slice_size: devices of each of several slices; None for a single slice.
      compiler_options: flags that a run on these devices sets through its environment.
    """

    name: str
    devices: Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stubs
    spec: DeviceSpec | None
    slice_size: int | None = None
    compiler_options: dict[str, str | bool] | None = None

    @property
    def slices(self) -> int:
        """Number of slices."""
        return len(self.devices) // (self.slice_size or len(self.devices))


def open_topology(name: str) -> Topology:
    """The devices of `v5e:4x4`, optionally followed by `,slices=2`; of a key of `GPUS`; or `cpu`.

    Raises:
      UserError: there is no such topology, or the TPU compiler is missing.
    """
    set_compiler_flags()
    if name == "cpu":
        return Topology(name, jax.devices("cpu"), None)
    if name in GPUS:
        spec = device_spec(GPUS[name].name)
        return Topology(name, gpu_devices(name), spec, compiler_options={**GPU_OPTIONS})
    found = re.fullmatch(r"(v\d\w):(\d+(?:x\d+)*)(?:,slices=([1-9]\d*))?", name)
    if found is None or found[1] not in _TPUS:
        raise UserError(
            f"--topology={name} is not known: give one such as v5e:4x4, v6e:4x4, v5p:2x2x4 or "
            f"v5e:4x4,slices=2, one of {', '.join(GPUS)}, or cpu."
        )
    axes, accelerator = _TPUS[found[1]]
    sizes = [int(size) for size in found[2].split("x")]
    if len(sizes) != axes:
        raise UserError(
            f"--topology={name} has {len(sizes)} axes: a {found[1]} slice has {axes}; give "
            f"{found[1]}:{'x'.join(['4'] * axes)}, for example."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs the TPU compiler: install it with "
            "pip install 'spatial_ssrl_jax[tpu]'."
        )
    # Without these, libtpu queries the metadata of the machine that it runs on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", accelerator(math.prod(sizes)))
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # so that several plans can run
    layout = f"{found[1]}:{found[2]}"
    options = {"num_slices": int(found[3])} if found[3] else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=layout, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={name} cannot be compiled for ({error_line(error, 160)}): "
            "give a slice that is offered, such as v5e:4x4."
        ) from error
    devices = described.devices
    slices = int(found[3] or 1)
    size = len(devices) // slices if slices > 1 else None
    return Topology(name, devices, device_spec(devices[0].device_kind), size)
