"""What devices can do at most, from their makers' datasheet."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class DeviceSpec:
    """The most that one device does.

    Attributes:
      flops: dense bf16 FLOP/s.
      bandwidth: bytes/s of its memory; a plain copy reaches some nine tenths of it.
      memory: bytes that a program may use, as the chip's compiler gives it; None where not known.
      network: bytes/s that it sends along one axis of its slice's torus, both ways; None likewise.
      far: bytes/s that it sends to other slices, its share of its host's network card.
    """

    flops: float
    bandwidth: float
    memory: int | None = None
    network: float | None = None
    far: float | None = None


_GIB = 2**30
_SHARE = 0.95  # of a GPU's memory, as XLA_PYTHON_CLIENT_MEM_FRACTION gives it to a program
_V5E = DeviceSpec(197e12, 819e9, int(15.75 * _GIB), 100e9, 3.1e9)
_V5P = DeviceSpec(459e12, 2765e9, int(95.74 * _GIB), 200e9, 6.2e9)
_V6E = DeviceSpec(918e12, 1640e9, int(31.25 * _GIB), 200e9, 6.2e9)


# Substring of `device_kind` -> peak; the first that fits counts.
_PEAKS = {
    "H100 PCIe": DeviceSpec(756e12, 2.0e12),
    "H100 NVL": DeviceSpec(835e12, 3.9e12),
    "H100": DeviceSpec(989e12, 3.35e12, int(_SHARE * 84.9e9)),
    "H200": DeviceSpec(989e12, 4.8e12),
    "A100-SXM4-80GB": DeviceSpec(312e12, 2.039e12, int(_SHARE * 84.9e9)),
    "A100 80GB": DeviceSpec(312e12, 1.935e12, int(_SHARE * 84.9e9)),
    "RTX 4090": DeviceSpec(165e12, 1.008e12, int(_SHARE * 25.2e9)),
    "A100": DeviceSpec(312e12, 1.555e12),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5p": _V5P,
    "TPU v5": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
}


def device_spec(kind: str | None = None) -> DeviceSpec | None:
    """The peak of a `device_kind`, by default the first device's; None where it is not known."""
    kind = kind or jax.devices()[0].device_kind
    return next((peak for name, peak in _PEAKS.items() if name in kind), None)


def device_memory_bytes() -> int | None:
    """Bytes that a program may use of the first device; None where they are not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")
