"""How long the devices wait for the host between programs."""

import time


class HostGap:
    """Seconds in which the devices have nothing to run, as far as the host knows.

    A gap begins where the host has waited for the results of all programs, and ends where it calls
    the next one, whose compiling is not in it. What the host does not see is not in it: devices
    that finish one program before the next one is called.
    """

    def __init__(self):
        self._seconds = 0.0
        self._since: float | None = None

    def begin(self) -> None:
        """Call it where nothing that was called still runs."""
        if self._since is None:
            self._since = time.perf_counter()

    def end(self) -> None:
        """Call it before a program is called."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def take(self) -> float:
        """The seconds since the last call, with those of a gap that has not ended."""
        is_open = self._since is not None
        self.end()
        seconds, self._seconds = self._seconds, 0.0
        if is_open:
            self.begin()
        return seconds
