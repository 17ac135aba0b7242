"""Peak rates and memory of devices, from their makers' datasheets."""

from dataclasses import dataclass

import jax

_GIB = 2**30
_GPU_FRACTION = 0.95  # of a GPU's memory, as XLA_PYTHON_CLIENT_MEM_FRACTION gives it to a program


@dataclass(frozen=True)
class DeviceSpec:
    """Peak rates of one device.

    Attributes:
      flops: dense bf16 FLOP/s.
      bandwidth: bytes/s of its memory; a plain copy reaches about nine tenths of it.
      memory: bytes that a program may use; None where not known.
      network: bytes/s that it sends along one axis of its slice's torus, both ways; None likewise.
      dcn: bytes/s that it sends to other slices over the data-centre network, its fraction of its
        host's network card; None likewise.
      total_memory: bytes of a GPU's memory; None likewise.
    """

    flops: float
    bandwidth: float
    memory: int | None = None
    network: float | None = None
    dcn: float | None = None
    total_memory: int | None = None


def _gpu(flops: float, bandwidth: float, total_memory: float) -> DeviceSpec:
    total = int(total_memory)
    return DeviceSpec(flops, bandwidth, int(_GPU_FRACTION * total_memory), total_memory=total)


_V5E = DeviceSpec(197e12, 819e9, int(15.75 * _GIB), 100e9, 3.1e9)
_V5P = DeviceSpec(459e12, 2765e9, int(95.74 * _GIB), 200e9, 6.2e9)
_V6E = DeviceSpec(918e12, 1640e9, int(31.25 * _GIB), 200e9, 6.2e9)


# Substring of `device_kind` -> specification; the first match counts.
_SPECS = {
    "H100 PCIe": DeviceSpec(756e12, 2.0e12),
    "H100 NVL": DeviceSpec(835e12, 3.9e12),
    "H100": _gpu(989e12, 3.35e12, 84.9e9),
    "H200": DeviceSpec(989e12, 4.8e12),
    "A100-SXM4-80GB": _gpu(312e12, 2.039e12, 84.9e9),
    "A100 80GB": _gpu(312e12, 1.935e12, 84.9e9),
    "RTX 4090": _gpu(165e12, 1.008e12, 25.2e9),
    "A100": DeviceSpec(312e12, 1.555e12),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5p": _V5P,
    "TPU v5": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
}


def device_spec(kind: str | None = None) -> DeviceSpec | None:
    """Peak rates of a `device_kind`, by default the first device's; None where not known."""
    kind = kind or jax.devices()[0].device_kind
    return next((spec for name, spec in _SPECS.items() if name in kind), None)


def device_memory_bytes() -> int | None:
    """Bytes that a program may use of the first device; None where not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")
