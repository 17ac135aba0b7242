"""Progress on the terminal: a live line for each stage, and the table of results at the end."""

import time
from collections.abc import Callable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from spatial_ssrl_jax.common.text import clock, printable

_SHOWN = (  # metric, its label, and its number format
    ("reward/overall_mean", "reward", "{:.3f}"),
    ("reward/accuracy_mean", "accuracy", "{:.3f}"),
    ("loss/sft", "loss", "{:.4f}"),
    ("response/length_mean", "length", "{:.0f}"),
    ("perf/tokens_per_second", "tokens/s", "{:,.0f}"),
)
_PLAIN_SECONDS = 10  # between two lines where there is no terminal
_WIDE = 100  # columns of a terminal that has room for the bar
_SPEED_SECONDS = 7200  # window of the time left; a step may take minutes


class _TimeLeft(ProgressColumn):
    """The time left; until the first step is done, the time that it has taken so far."""

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        if left is None:
            return Text(clock(task.elapsed or 0))
        return Text(f"{clock(left)} left")


class Progress:
    """A bar for each stage on a terminal; elsewhere plain lines, one in ten seconds.

    Args:
      console: where to print; the terminal by default.
      quiet: print nothing.

    Attributes:
      on_progress: called when new work starts.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False):
        self.console = console or Console(quiet=quiet)
        self.on_progress: Callable[[], None] = lambda: None
        self._bar: Bar | None = None
        self._task: TaskID | None = None  # of the stage
        self._stage, self._total, self._last = "", 0, 0.0
        self._done, self._began = 0, 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """Starts a stage of `total` steps, of which `done` are done."""
        self.stop()
        self._stage, self._total, self._last = stage, total, 0.0
        self._done, self._began = done, time.monotonic()
        if not self.console.is_terminal:
            return
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
            _TimeLeft(),
        ]
        if self.console.width >= _WIDE:
            columns[1:1] = [SpinnerColumn(), BarColumn(bar_width=16)]
        bar = self._show(*columns)
        self._task = bar.add_task(stage, total=total, completed=done, metrics="")

    def _show(self, *columns: ProgressColumn, transient: bool = False) -> Bar:
        self._bar = Bar(
            *columns,
            console=self.console,
            transient=transient,
            speed_estimate_period=_SPEED_SECONDS,
        )
        self._bar.start()
        return self._bar

    def doing(self, text: str) -> None:
        """Shows what is being done; on a terminal, until the next step and with its time so far."""
        self.on_progress()
        text = printable(text)
        if not self.console.is_terminal:
            self.say(text)
        elif self._bar is not None and self._task is not None:
            self._bar.update(self._task, metrics=text)
        else:
            self.stop()
            shown = TextColumn("{task.description}", markup=False)  # names may hold anything
            columns = (SpinnerColumn(), shown, TimeElapsedColumn())
            self._show(*columns, transient=True).add_task(text, total=None)

    def step(self, number: int, metrics: Mapping[str, float]) -> None:
        """Shows the metrics of step `number` of the stage, by their names in `NAMES`."""
        space = " " if self.console.is_terminal and self.console.width < _WIDE else "  "
        text = space.join(
            f"{name} {style.format(metrics[key])}" for key, name, style in _SHOWN if key in metrics
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=number, metrics=text)
        elif number == self._total or time.monotonic() - self._last > _PLAIN_SECONDS:
            self._last = time.monotonic()
            line = f"{self._stage} {number}/{self._total}  {text}{self._left(number)}"
            self.console.print(line, highlight=False)

    def _left(self, number: int) -> str:
        """The time left by the stage's mean so far; empty where it is unknown or zero."""
        done = number - self._done
        if done <= 0 or number >= self._total:
            return ""
        seconds = (time.monotonic() - self._began) / done * (self._total - number)
        return f"  {clock(seconds)} left"

    def say(self, text: str) -> None:
        """Prints one line."""
        self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._task = None, None

    def table(
        self, heldout: Mapping[str, Mapping[str, Mapping[str, float]]], trained: Sequence[str]
    ) -> None:
        """Prints held-out accuracy and format of each task, before training and after each stage.

        Beside them is what a random answer gets, and what the model gets with grey images.

        Args:
          heldout: stage -> task -> metric -> value.
          trained: the tasks that are trained; they are marked.
        """
        stages = [s for s in ("untrained", "sft", "grpo") if heldout.get(s)]
        title = "held-out images: greedy accuracy, sampled accuracy, format"
        table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for column in ("task", "chance", *stages, "grey"):
            table.add_column(column, justify="left" if column == "task" else "right")
        tasks = list(dict.fromkeys(task for s in stages for task in heldout[s]))
        for task in tasks:
            name = "mean *" if task == "mean" else task + (" *" if task in trained else "")
            rows = [heldout[stage].get(task) for stage in stages]
            table.add_row(
                f" {task.partition('/')[2]}" if "/" in task else name,
                _one(rows, "chance"),
                *map(_cell, rows),
                _one(rows, "accuracy_grey"),
                style="bold" if task == "mean" else None,
            )
        table.caption = "* trained; grey: sampled accuracy after the last stage, with grey images"
        self.console.print(table)


def _one(rows: Sequence[Mapping[str, float] | None], name: str) -> str:
    """The last stage's value of a metric that some stages have."""
    found = [row[name] for row in rows if row and name in row]
    return f"{found[-1]:.2f}" if found else "-"


def _cell(row: Mapping[str, float] | None) -> str:
    if row is None:
        return "-"
    return " ".join(f"{row[k]:.2f}" for k in ("accuracy_greedy", "accuracy_sampled", "format"))
