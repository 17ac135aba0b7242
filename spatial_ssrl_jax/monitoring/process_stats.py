"""Compilations and memory of this process."""

import re
import resource
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_hits"  # recorded by the same thread before `_COMPILED`
_NAMED_SECONDS = 0.5  # of the programs that a message names


@dataclass(frozen=True)
class Compiled:
    """Programs of one name, or all.

    Attributes:
      count: how many were compiled or read from the compilation cache.
      read: how many of them were read.
      seconds: the time of both.
    """

    count: int = 0
    read: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Compiled") -> "Compiled":
        return Compiled(
            self.count + other.count, self.read + other.read, self.seconds + other.seconds
        )

    def __sub__(self, other: "Compiled") -> "Compiled":
        return Compiled(
            self.count - other.count, self.read - other.read, self.seconds - other.seconds
        )


class CompilationCounter:
    """Counts the programs that are compiled after construction, by name.

    Attributes:
      waited: those of the thread that constructed it; others compile while it runs programs.
    """

    def __init__(self):
        self.waited = Compiled()
        self._programs: dict[str, Compiled] = defaultdict(Compiled)
        self._thread, self._lock = threading.get_ident(), threading.Lock()
        self._reading: set[int] = set()  # threads whose program was read, not compiled
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    @property
    def programs(self) -> dict[str, Compiled]:
        """Name of the jitted function -> its programs, of all threads."""
        with self._lock:
            return dict(self._programs)

    def count(self, names: Iterable[str]) -> int:
        """Programs of these names."""
        programs = self.programs
        return sum(programs[name].count for name in names if name in programs)

    def _on_event(self, event: str, **_: str | int) -> None:
        if event == _READ:
            self._reading.add(threading.get_ident())

    def _on_duration(self, event: str, duration_secs: float, **labels: str | int) -> None:
        if event != _COMPILED:
            return
        thread = threading.get_ident()
        one = Compiled(1, int(thread in self._reading), duration_secs)
        self._reading.discard(thread)
        with self._lock:
            self._programs[_name(str(labels.get("fun_name", "")))] += one
            if thread == self._thread:
                self.waited += one


def _name(program: str) -> str:
    """The function's name of `jit(name)`."""
    found = re.fullmatch(r"\w+\((.*)\)", program)
    return found[1] if found else program


def describe_programs(programs: dict[str, Compiled], before: dict[str, Compiled]) -> str:
    """The programs since `before`, the slow ones by name: `prefill (2 in 1.8 s), 40 others`."""
    new = {name: found - before.get(name, Compiled()) for name, found in programs.items()}
    slow = [(name, found) for name, found in new.items() if found.seconds >= _NAMED_SECONDS]
    words = [
        f"{name} ({f'{found.count} in ' if found.count > 1 else ''}{found.seconds:.1f} s)"
        for name, found in sorted(slow, key=lambda item: -item[1].seconds)
    ]
    others = sum(found.count for found in new.values()) - sum(found.count for _, found in slow)
    if others:
        words.append(f"{others} {'others' if slow else 'small ones'}")
    read = sum(found.read for found in new.values())
    return ", ".join(words) + (f"; {read} were read from the cache" if read else "")


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
