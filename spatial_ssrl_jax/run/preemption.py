"""Stopping on request: SIGTERM or Ctrl-C once saves and exits, Ctrl-C twice exits at once."""

import signal


class Preemption:
    """Inside `with`, notes the first SIGTERM or SIGINT instead of dying of it.

    Attributes:
      requested: a signal has asked the run to stop.
    """

    def __init__(self):
        self.requested = False
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
        self.requested = True
