"""What devices can do at most, from their makers' data sheets."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Peak:
    """The most that one device does.

    Attributes:
      flops: dense bf16 FLOP/s.
      bandwidth: bytes/s of its memory; a plain copy reaches some nine tenths of it.
    """

    flops: float
    bandwidth: float


# Substring of `device_kind` -> peak; the first that fits counts.
_PEAKS = {
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100": Peak(989e12, 3.35e12),
    "H200": Peak(989e12, 4.8e12),
    "A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "A100 80GB": Peak(312e12, 1.935e12),
    "A100": Peak(312e12, 1.555e12),
    "TPU v5 lite": Peak(197e12, 819e9),
    "TPU v5e": Peak(197e12, 819e9),
    "TPU v5p": Peak(459e12, 2765e9),
    "TPU v5": Peak(459e12, 2765e9),
    "TPU v6 lite": Peak(918e12, 1640e9),
    "TPU v6e": Peak(918e12, 1640e9),
}


def device_peak(kind: str | None = None) -> Peak | None:
    """The peak of a `device_kind`, by default the first device's; None where it is not known."""
    kind = kind or jax.devices()[0].device_kind
    return next((peak for name, peak in _PEAKS.items() if name in kind), None)


def memory_bytes() -> int | None:
    """Bytes that a program may use of the first device; None where they are not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")
