"""Progress: plain lines into a file, a bar on a terminal, and the table at the end."""

import io
import re

import pytest
from rich.console import Console

from spatial_ssrl_jax.monitoring.progress import Progress


def recording(terminal: bool, width: int = 100, **options) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, **options)


def shown(console: Console) -> str:
    return console.file.getvalue()


def test_plain_lines_are_few_and_the_last_step_is_among_them(monkeypatch: pytest.MonkeyPatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    console = recording(terminal=False)
    with Progress(console) as progress:
        progress.start("sft", total=30)
        for number in range(1, 31):
            now[0] += 1.0
            progress.step(number, {"loss/sft": 0.5, "perf/tokens_per_second": 12345.6})
    lines = shown(console).splitlines()
    assert [line.split()[1] for line in lines] == ["1/30", "12/30", "23/30", "30/30"]
    assert lines[0] == "sft 1/30  loss 0.5000  tokens/s 12,346  0:29 left"
    assert lines[1].endswith("0:18 left") and lines[-1].endswith("12,346")


def test_an_absent_metric_is_not_shown():
    console = recording(terminal=False)
    with Progress(console) as progress:
        progress.start("grpo", total=1)
        progress.step(1, {"reward/overall_mean": 0.25, "response/length_mean": 11.6})
    assert shown(console) == "grpo 1/1  reward 0.250  length 12\n"


def test_a_terminal_gets_a_live_bar():
    console = recording(terminal=True)
    with Progress(console) as progress:
        progress.start("grpo", total=8, done=2)
        progress.step(5, {"reward/overall_mean": 0.25})
    assert "5/8" in shown(console) and "reward 0.250" in shown(console)


METRICS = {
    "reward/overall_mean": 0.25,
    "reward/accuracy_mean": 0.2,
    "response/length_mean": 211.0,
    "perf/tokens_per_second": 1800.0,
}


def last_line(console: Console) -> str:
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(console)).replace("\r", "\n")
    return [line.strip() for line in text.splitlines() if line.strip()][-1]


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_is_truncated_and_slow_steps_have_a_time_left(width: int):
    """Two minutes a step, as at the paper's size: longer than Rich looks back by itself."""
    now = [1000.0]
    console = recording(terminal=True, width=width, get_time=lambda: now[0])
    with Progress(console) as progress:
        progress.start("grpo", total=360, done=100)
        for number in range(101, 105):
            now[0] += 120
            progress.step(number, METRICS)
    text = "reward 0.250 accuracy 0.200 length 211 tokens/s 1,800"
    assert last_line(console).replace("  ", " ").endswith(f"104/360 {text} 8:32:00 left")
    assert "grpo" in last_line(console)


def test_current_work_is_shown_with_its_time_until_a_step_is_done():
    now = [1000.0]
    console = recording(terminal=True, get_time=lambda: now[0])
    with Progress(console) as progress:
        progress.doing("measuring")
        now[0] += 65
        progress.start("sft", total=8)
        progress.doing("compiling")
        now[0] += 75
    assert "measuring" in shown(console)
    assert last_line(console).endswith("0/8 compiling 1:15")
    plain = recording(terminal=False)
    Progress(plain).doing("compiling")
    assert shown(plain) == "compiling\n"


def test_text_in_brackets_is_printed_unchanged():
    console = recording(terminal=False)
    Progress(console).say("skipped [bold]x.png[/bold] " + "y" * 200)
    assert shown(console) == "skipped [bold]x.png[/bold] " + "y" * 200 + "\n"


def test_names_cannot_steer_the_terminal():
    console = recording(terminal=False)
    Progress(console).say("skipped \x1b[2J.png and \udcff.png")
    Progress(console).doing("reading \x1b[2J")
    assert shown(console) == "skipped \\x1b[2J.png and \\udcff.png\nreading \\x1b[2J\n"


def test_the_table_has_a_row_a_task_and_a_column_a_stage():
    def row(greedy: float) -> dict[str, float]:
        return {"accuracy_greedy": greedy, "accuracy_sampled": 0.5, "format": 1.0}

    heldout = {
        "grpo": {
            "flip": row(0.75) | {"chance": 0.125, "accuracy_grey": 0.131},
            "flip/vertical": row(0.7),
            "depth": row(0.3),
            "mean": row(0.75),
        },
        "untrained": {"flip": row(0.125), "mean": row(0.125)},
    }
    console = recording(terminal=False)
    Progress(console).table(heldout, trained=["flip"])
    text = shown(console)
    header = next(line for line in text.splitlines() if "task" in line)
    assert header.index("untrained") < header.index("grpo") and "sft" not in header
    lines = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if len(cells := re.split(r" {2,}", line.strip())) == 5 and cells[0] != "task"
    }
    assert lines == {
        "flip *": ["0.12", "0.12 0.50 1.00", "0.75 0.50 1.00", "0.13"],
        "vertical": ["-", "-", "0.70 0.50 1.00", "-"],
        "depth": ["-", "-", "0.30 0.50 1.00", "-"],
        "mean *": ["-", "0.12 0.50 1.00", "0.75 0.50 1.00", "-"],
    }
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_shown_as_they_are(terminal: bool):
    """What would be markup or a field of a format is neither an error nor left out."""
    console, odd = recording(terminal), "reading [/x]{y}[bold]"
    with Progress(console) as progress:
        progress.doing(odd)
        progress.start("sft", total=3)
        progress.doing(odd)
        progress.say(odd)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(console))
    assert text.count(odd) >= (3 if terminal else 2)
