"""NVIDIA GPUs as XLA's compiler wants them described, so that it compiles without one."""

from dataclasses import dataclass

import jax
from jax.experimental import topologies

from spatial_ssrl_jax.common.errors import UserError

_KIND = """
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
    """What the compiler asks of a GPU, as its maker and its driver give it.

    Attributes:
      name: the driver's name.
      major, minor: compute capability.
      cores: streaming multiprocessors.
      units: 32-bit floating-point units of each.
      threads: that each holds.
      shared_memory, block_memory: bytes of each, and what one block may ask for.
      cache: bytes of the second-level cache.
      clock: GHz.
      memory, bandwidth: bytes, and bytes/s.
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
    memory: int
    bandwidth: int


GPUS = {
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3",
        *(9, 0, 132, 128, 2048, 233_472, 232_448, 52_428_800, 1.98),
        *(84_942_979_072, 3_352_320_000_000),
    ),
    "a100-80gb": Gpu(
        "NVIDIA A100-SXM4-80GB",
        *(8, 0, 108, 64, 2048, 167_936, 166_912, 41_943_040, 1.41),
        *(84_974_239_744, 2_039_000_000_000),
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090",
        *(8, 9, 128, 128, 1536, 102_400, 101_376, 75_497_472, 2.52),
        *(25_266_814_976, 1_008_000_000_000),
    ),
}


def gpu_devices(name: str) -> list[jax.Device]:
    """One GPU of the kind `name` of `GPUS`, for the compiler alone.

    Raises:
      UserError: JAX's CUDA plugin is missing, or cannot compile here.
    """
    described = _KIND.format(**vars(GPUS[name]))
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology="1x1x1", target_config=described
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--topology={name} needs the compiler of JAX's CUDA plugin "
            f"({' '.join(str(error).split())[:120]}): install it with "
            "pip install 'spatial_ssrl_jax[gpu]'."
        ) from error
    return found.devices
