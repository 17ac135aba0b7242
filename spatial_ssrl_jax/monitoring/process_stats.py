"""Compilations and memory of this process."""

import resource

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
    """Counts the programs that XLA compiles after construction.

    Attributes:
      count: number of compilations.
      seconds: their total time.
    """

    def __init__(self):
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            self.count += 1
            self.seconds += duration_secs


def memory_metrics() -> dict[str, float]:
    """Resident bytes of this process, and peak bytes of its first device, where they are known."""
    found = {}
    try:
        with open("/proc/self/statm") as file:
            found["memory/host_bytes"] = float(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        pass
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        found["memory/device_bytes"] = float(stats["peak_bytes_in_use"])
    return found
