"""Where a program's time goes: one run under JAX's profiler, summed up by kernel."""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData, ProfileEvent

from spatial_ssrl_jax.common.errors import UserError

_SHOWN = 20
_NUMBERS = re.compile(r"([._]\d+|\.clone)+$")


def profiled(run: Callable[[], Any], folder: str) -> dict[str, Any]:
    """Runs once more, traced.

    Args:
      run: returns when the devices are done.
      folder: the trace goes there, for TensorBoard or Perfetto.

    Returns:
      `profiled_seconds`, of the run; `busy_seconds`, sums over kernels on the busiest device (on
      CPU over all threads); and of the costliest `kernels` each one's name without its number, its
      calls, seconds, and share of the busy seconds.

    Raises:
      UserError: the trace names no kernel.
    """
    with jax.profiler.trace(folder):
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    newest = max(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    busy, kernels = _busiest(ProfileData.from_file(str(newest)))
    if not kernels:
        raise UserError(f"{newest} names no kernel: open it in TensorBoard or Perfetto.")
    return {"profiled_seconds": seconds, "busy_seconds": busy, "kernels": kernels}


def _busiest(data: ProfileData) -> tuple[float, list[dict[str, Any]]]:
    best: tuple[float, dict[str, list[float]]] = (0.0, {})
    for plane in data.planes:
        sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        whole = plane.name.startswith("/device:GPU")  # its lines are streams of kernels
        for line in plane.lines:
            if whole:  # side by side, not inside each other
                spent = [(_NUMBERS.sub("", e.name), e.duration_ns * 1e-9) for e in line.events]
            else:
                spent = _own_seconds(e for e in line.events if _is_operation(e))
            for name, seconds in spent:
                sums[name][0] += 1
                sums[name][1] += seconds
        best = max(best, (sum(s for _, s in sums.values()), sums), key=lambda found: found[0])
    whole, sums = best
    ordered = sorted(sums.items(), key=lambda item: -item[1][1])[:_SHOWN]
    return whole, [
        {"name": name, "calls": calls, "seconds": seconds, "share": seconds / whole}
        for name, (calls, seconds) in ordered
    ]


def _is_operation(event: ProfileEvent) -> bool:
    return any(name == "hlo_op" for name, _ in event.stats)


def _own_seconds(events: Iterable[ProfileEvent]) -> list[tuple[str, float]]:
    """Each event's name and its seconds, without those of the events inside it."""
    found: list[tuple[str, float]] = []
    around: list[tuple[float, int]] = []  # end and place in `found` of what is still open
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        while around and around[-1][0] <= event.start_ns:
            around.pop()
        seconds = event.duration_ns * 1e-9
        if around:
            name, outer = found[around[-1][1]]
            found[around[-1][1]] = name, outer - seconds
        around.append((event.start_ns + event.duration_ns, len(found)))
        found.append((_NUMBERS.sub("", event.name), seconds))
    return found
