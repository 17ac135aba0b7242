"""Stopping on request: SIGTERM or Ctrl-C once saves and exits, Ctrl-C twice exits at once."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPPING = "stopping after this step, which is saved; Ctrl-C again exits at once"


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the process with exit code 0; a `Preemption` inside overrides it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Preemption:
    """Inside `with`, records the first SIGTERM or SIGINT instead of ending the process.

    Attributes:
      requested: whether a signal has requested a stop.
      say: called with a message at the signal.
    """

    def __init__(self):
        self.requested = False
        self.say: Callable[[str], None] = lambda _: None
        self._before: dict[signal.Signals, Any] = {}  # handlers, as `signal.signal` returns them

    def __enter__(self) -> "Preemption":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            with contextlib.suppress(RuntimeError):  # the signal came while a line was printed
                self.say(STOPPING)
