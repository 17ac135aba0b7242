"""`metrics.jsonl` and its parts: known names, `null` for NaN, no line after a restored step."""

import json
import math
import re
from pathlib import Path

import pytest

from spatial_ssrl_jax.common import paths as folders
from spatial_ssrl_jax.monitoring.metrics import NAMES, MetricsWriter, read_metrics


def write_steps(folder: Path, steps: range, resume: int = 0, **options) -> None:
    writer = MetricsWriter(folder, resume, **options)
    for step in steps:
        writer.write("sft", step, {"loss/sft": 1.0 / step, "perf/step_seconds": 0.5})
    writer.close()


def test_a_line_a_step_with_sorted_names(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    writer.write("grpo", 3, {"reward/overall_mean": 0.25, "loss/kl": 0.5, "task/flip/count": 7})
    writer.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert list(row) == [
        "step",
        "stage",
        "time",
        "loss/kl",
        "reward/overall_mean",
        "task/flip/count",
    ]
    assert (row["step"], row["stage"], row["task/flip/count"]) == (3, "grpo", 7)
    assert list(tmp_path.glob("events.*"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_null(tmp_path: Path, value: float):
    writer = MetricsWriter(tmp_path)
    writer.write("grpo", 1, {"loss/total": value})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss/total": null' in text


@pytest.mark.parametrize(
    "name", ["reward/overal_mean", "task/accuracy", "task/a/b/accuracy", "xloss/sft", "loss/sft2"]
)
def test_an_unknown_name_is_refused_and_not_written(tmp_path: Path, name: str):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match=f"unknown metric {name}"):
        writer.write("sft", 1, {"loss/sft": 1.0, name: 1.0})
    writer.close()
    assert read_metrics(tmp_path) == []


def test_every_listed_name_is_accepted(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    names = [re.sub("<[a-z]+>", "name", name) for name in NAMES]
    writer.write("grpo", 1, dict.fromkeys(names, 1.0))
    writer.close()
    assert len(read_metrics(tmp_path)[0]) == len(NAMES) + 3


def test_resume_removes_lines_after_the_restored_step(tmp_path: Path):
    write_steps(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write_steps(tmp_path, range(5, 7), resume=4)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:4] == before[:4]
    assert not list(tmp_path.glob("*.partial"))


def test_a_start_from_nothing_removes_all_lines(tmp_path: Path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 2))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_truncated_line_is_ignored_and_replaced(tmp_path: Path):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, range(3, 4), resume=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_no_file_reads_as_no_rows(tmp_path: Path):
    assert read_metrics(tmp_path) == []


def parts(folder: Path) -> dict[str, list[int]]:
    """The steps of each part; every line must be whole."""
    return {
        path.name: [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in sorted((folder / "metrics").iterdir())
    }


def test_parts_hold_a_hundred_steps_each_and_nothing_else(tmp_path: Path):
    write_steps(tmp_path, range(1, 231), in_parts=True)
    assert parts(tmp_path) == {
        "part_000001.jsonl": [*range(1, 100)],
        "part_000002.jsonl": [*range(100, 200)],
        "part_000003.jsonl": [*range(200, 231)],
    }
    assert not (tmp_path / "metrics.jsonl").exists()
    assert [row["step"] for row in read_metrics(tmp_path)] == [*range(1, 231)]


@pytest.mark.parametrize("step", [99, 100, 150, 199, 200, 230])
def test_resume_in_parts_continues_after_the_restored_step(tmp_path: Path, step: int):
    write_steps(tmp_path, range(1, 231), in_parts=True)
    write_steps(tmp_path, range(step + 1, step + 4), resume=step, in_parts=True)
    assert [row["step"] for row in read_metrics(tmp_path)] == [*range(1, step + 4)]
    assert all(n // 100 == int(name[5:11]) - 1 for name, ns in parts(tmp_path).items() for n in ns)


def test_a_start_from_nothing_removes_all_parts(tmp_path: Path):
    write_steps(tmp_path, range(1, 231), in_parts=True)
    write_steps(tmp_path, range(1, 3), in_parts=True)
    assert parts(tmp_path) == {"part_000001.jsonl": [1, 2]}


def test_a_part_is_whole_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The files before and after each replacement have complete lines."""
    replace, seen = folders.os.replace, []

    def watched(new: Path, old: Path) -> None:
        for path in (new, old):
            lines = path.read_text().splitlines() if path.exists() else []
            seen.append([json.loads(line)["step"] for line in lines])
        replace(new, old)

    monkeypatch.setattr(folders.os, "replace", watched)
    write_steps(tmp_path, range(1, 4), in_parts=True)
    assert seen == [[1], [], [1, 2], [1], [1, 2, 3], [1, 2]]


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2',
        b"\xff\xfe",
        b"[]",
        b'{"step": null, "stage": "sft", "time": 1.0}',
        b'{"step": 2, "stage": false, "time": 1.0}',
        b'{"step": 2, "stage": "sft", "time": 1e300}',
        b'{"step": 2, "stage": "sft", "time": 1.0, "loss/sft": "a"}',
        b'{"step": 2, "stage": "sft", "time": 1.0, "loss/sft": 1e308}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_left_out(tmp_path: Path, line: bytes):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, lines[2]]) + b"\n")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]
