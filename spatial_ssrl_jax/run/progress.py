"""What a person at the terminal sees: a live line a stage, and the table at the end."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

_SHOWN = (  # metric, how it is called here, and its format
    ("reward/overall_mean", "reward", "{:.3f}"),
    ("reward/accuracy_mean", "accuracy", "{:.3f}"),
    ("loss/sft", "loss", "{:.4f}"),
    ("response/length_mean", "length", "{:.0f}"),
    ("perf/tokens_per_second", "tokens/s", "{:,.0f}"),
)
_PLAIN_SECONDS = 10


class Progress:
    """A bar a stage on a terminal; plain lines, one in ten seconds, anywhere else.

    Args:
      console: where to print; the terminal unless given.
      quiet: print nothing.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False):
        self.console = console or Console(quiet=quiet)
        self._bar: Bar | None = None
        self._task = None
        self._stage, self._total, self._last = "", 0, 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """Begins a stage of `total` steps of which `done` are done."""
        self.stop()
        self._stage, self._total, self._last = stage, total, 0.0
        if not self.console.is_terminal:
            return
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task(stage, total=total, completed=done, figures="")
        self._bar.start()

    def step(self, number: int, metrics: dict[str, float]) -> None:
        """Shows step `number` of the stage."""
        figures = "  ".join(
            f"{name} {form.format(metrics[key])}" for key, name, form in _SHOWN if key in metrics
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=number, figures=figures)
        elif number == self._total or time.monotonic() - self._last > _PLAIN_SECONDS:
            self._last = time.monotonic()
            self.console.print(f"{self._stage} {number}/{self._total}  {figures}", highlight=False)

    def say(self, text: str) -> None:
        """One line about what is going on."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def table(self, heldout: dict[str, dict], trained: Sequence[str]) -> None:
        """Prints held-out accuracy and form per task, before training and after each stage."""
        stages = [s for s in ("untrained", "sft", "grpo") if heldout.get(s)]
        table = Table(title="held-out pictures: greedy accuracy, sampled accuracy, form")
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
