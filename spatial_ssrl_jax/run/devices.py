"""What devices can do at most, from their makers' data sheets."""

import jax

# Substring of `device_kind` -> dense bf16 FLOP/s of one device.
_PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def memory_bytes() -> int | None:
    """Bytes that a program may use of the first device; None where they are not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of the first device; None where they are not known, as of a CPU."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in kind), None)
