"""What the process itself uses: compilations and memory."""

import resource

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
    """Programs that XLA compiles from construction on.

    Attributes:
      count: how many.
      seconds: how long that took.
    """

    def __init__(self):
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration: float, **_) -> None:
        if event == _COMPILED:
            self.count += 1
            self.seconds += duration


def memory_metrics() -> dict[str, float]:
    """Resident bytes of this process, and the most that its first device has held, where known."""
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
