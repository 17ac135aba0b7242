"""Descriptions of NVIDIA GPUs for XLA, which can compile for them without one."""

import os
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.perf.device_specs import device_spec

_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory}
  shared_memory_per_block_optin: {block_memory}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 9 patch: 0 }}
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


@dataclass(frozen=True)
class Gpu:
    """What XLA's compiler needs to know of a GPU; its memory is that of `device_spec`.

    Attributes:
      name: the driver's name.
      major, minor: compute capability.
      cores: streaming multiprocessors.
      units: 32-bit floating-point units of each.
      threads: resident threads of each.
      shared_memory: bytes of each.
      block_memory: bytes of shared memory that one block may use.
      cache: bytes of the second-level cache.
      clock: GHz.
    """

    name: str
    major: int
    minor: int
    cores: int
    units: int
    threads: int
    shared_memory: int
    block_memory: int
    cache: int
    clock: float


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 0, 132, 128, 2048, 233_472, 232_448, 52_428_800, 1.98),
    "a100-80gb": Gpu(
        "NVIDIA A100-SXM4-80GB", 8, 0, 108, 64, 2048, 167_936, 166_912, 41_943_040, 1.41
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", 8, 9, 128, 128, 1536, 102_400, 101_376, 75_497_472, 2.52
    ),
}


def target_config(gpu: Gpu) -> str:
    """A GPU's description as XLA reads it.

    Raises:
      ValueError: its memory is not known.
    """
    spec = device_spec(gpu.name)
    if spec is None or spec.total_memory is None:
        raise ValueError(f"the memory of {gpu.name} is not known.")
    return _TARGET.format(**vars(gpu), memory=spec.total_memory, bandwidth=int(spec.bandwidth))


def gpu_devices(name: str) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]  # jaxlib has no stubs
    """One GPU, for the compiler alone.

    Args:
      name: a key of `GPUS`.

    Raises:
      UserError: JAX's CUDA plugin is missing, or cannot compile here.
    """
    # The plugin's own check fails without a driver, which compiling does not need.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    target = target_config(GPUS[name])
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology="1x1x1", target_config=target
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--topology={name} needs the compiler of JAX's CUDA plugin "
            f"({error_line(error, 120)}): install it with "
            "pip install 'spatial_ssrl_jax[gpu]'."
        ) from error
    return found.devices
