"""What a person at the terminal sees: a live line a stage, and the table at the end."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

_SHOWN = (  # metric, how it is called here, and its format
    ("reward/overall_mean", "reward", "{:.3f}"),
    ("reward/accuracy_mean", "accuracy", "{:.3f}"),
    ("loss/sft", "loss", "{:.4f}"),
    ("response/length_mean", "length", "{:.0f}"),
    ("perf/tokens_per_second", "tokens/s", "{:,.0f}"),
)
_PLAIN_SECONDS = 10
_WIDE = 100  # characters of a terminal that has room for the bar itself
_SPEED_SECONDS = 7200  # the time left follows the steps of this long; one may take minutes


class _Clock(ProgressColumn):
    """The time left, and until that is known how long the first step has taken so far."""

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        if left is None:
            return Text(_clock(task.elapsed or 0))
        return Text(f"{_clock(left)} left")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """A bar a stage on a terminal; plain lines, one in ten seconds, anywhere else.

    Args:
      console: where to print; the terminal unless given.
      quiet: print nothing.

    Attributes:
      went_on: called whenever something new is done.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False):
        self.console = console or Console(quiet=quiet)
        self.went_on: Callable[[], None] = lambda: None
        self._bar: Bar | None = None
        self._task, self._in_stage = None, False
        self._stage, self._total, self._last = "", 0, 0.0
        self._done, self._began = 0, 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """Begins a stage of `total` steps of which `done` are done."""
        self.stop()
        self._stage, self._total, self._last = stage, total, 0.0
        self._done, self._began = done, time.monotonic()
        if not self.console.is_terminal:
            return
        self._in_stage = True
        count, figures = MofNCompleteColumn(), TextColumn("{task.fields[metrics]}")
        columns = [TextColumn("{task.description}"), count, figures, _Clock()]
        if self.console.width >= _WIDE:
            columns[1:1] = [SpinnerColumn(), BarColumn(bar_width=16)]
        self._show(*columns)
        self._task = self._bar.add_task(stage, total=total, completed=done, figures="")

    def _show(self, *columns: ProgressColumn, transient: bool = False) -> None:
        self._bar = Bar(
            *columns,
            console=self.console,
            transient=transient,
            speed_estimate_period=_SPEED_SECONDS,
        )
        self._bar.start()

    def doing(self, text: str) -> None:
        """What continues until the next step; on a terminal with the seconds that it takes so far."""
        self.went_on()
        if not self.console.is_terminal:
            self.say(text)
        elif self._in_stage:
            self._bar.update(self._task, figures=text)
        else:
            self.stop()
            self._show(SpinnerColumn(), TextColumn(text), TimeElapsedColumn(), transient=True)
            self._bar.add_task(text, total=None)

    def step(self, number: int, metrics: dict[str, float]) -> None:
        """Shows step `number` of the stage."""
        space = " " if self.console.is_terminal and self.console.width < _WIDE else "  "
        figures = space.join(
            f"{name} {form.format(metrics[key])}" for key, name, form in _SHOWN if key in metrics
        )
        if self._in_stage:
            self._bar.update(self._task, completed=number, figures=figures)
        elif number == self._total or time.monotonic() - self._last > _PLAIN_SECONDS:
            self._last = time.monotonic()
            line = f"{self._stage} {number}/{self._total}  {figures}{self._left(number)}"
            self.console.print(line, highlight=False)

    def _left(self, number: int) -> str:
        """The time left by the stage's mean so far; nothing where it is not known or over."""
        done = number - self._done
        if done <= 0 or number >= self._total:
            return ""
        seconds = (time.monotonic() - self._began) / done * (self._total - number)
        return f"  {_clock(seconds)} left"

    def say(self, text: str) -> None:
        """One line about what is continuing."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._in_stage = None, False

    def table(self, heldout: dict[str, dict], trained: Sequence[str]) -> None:
        """Prints held-out accuracy and form per task, before training and after each stage."""
        stages = [s for s in ("untrained", "sft", "grpo") if heldout.get(s)]
        table = Table(title="held-out images: greedy accuracy, sampled accuracy, form")
        table.add_column("task")
        for stage in stages:
            table.add_column(stage, justify="right")
        tasks = list(dict.fromkeys(task for s in stages for task in heldout[s]))
        for task in tasks:
            name = "mean of trained" if task == "mean" else task + (" *" if task in trained else "")
            cells = [_cell(heldout[stage].get(task)) for stage in stages]
            table.add_row(name, *cells, style="bold" if task == "mean" else None)
        table.caption = "* trained"
        self.console.print(table)


def _cell(row: dict[str, float] | None) -> str:
    if row is None:
        return "-"
    return " ".join(f"{row[k]:.3f}" for k in ("accuracy_greedy", "accuracy_sampled", "format"))
