"""Stopping on request: SIGTERM or Ctrl-C once saves and exits, Ctrl-C twice exits at once."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator

STOPPING = "stopping after this step, which is saved; Ctrl-C again exits at once"


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the process with 0, unless a `Preemption` inside waits for a step."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Preemption:
    """Inside `with`, notes the first SIGTERM or SIGINT instead of dying of it.

    Attributes:
      requested: a signal has asked the run to stop.
      say: is told at once that it has.
    """

    def __init__(self):
        self.requested = False
        self.say: Callable[[str], None] = lambda _: None
        self._before = {}

    def __enter__(self) -> "Preemption":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            with contextlib.suppress(RuntimeError):  # the signal came while a line was printed
                self.say(STOPPING)
