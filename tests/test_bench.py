"""`bench`: one JSON line with metrics that add up, and imports only what it times."""

import json
import os
import subprocess
import sys

import pytest

from spatial_ssrl_jax import bench
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.tasks import TASKS
from tests.conftest import ROOT

LIMITS = {task.name: 40 if task.needs_depth else 8 for task in TASKS}  # target in milliseconds


def run(capsys: pytest.CaptureFixture, *argv: str) -> dict:
    return run_command(capsys, "tasks", *argv)


def run_command(capsys: pytest.CaptureFixture, *argv: str) -> dict:
    bench.main([*argv, "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_every_task_is_timed_and_fast_enough(capsys: pytest.CaptureFixture):
    report = run(capsys, "--repeats=7", "--batches=0")
    assert set(report) == {"tasks"} and set(report["tasks"]) == set(LIMITS)
    for name, row in report["tasks"].items():
        assert row["size"] == ("1024x768" if LIMITS[name] == 40 else "640x480")
        assert 0 < row["ms"] <= row["ms_p90"] and 0 < row["accepted"] <= 1
        print(f"measured {name}: {row['ms']} ms")
        assert row["ms"] < 2 * LIMITS[name]  # twice the target, for busy machines


def test_the_pipeline_is_timed_as_a_step_waits_for_it(capsys: pytest.CaptureFixture):
    argv = ["--repeats=1", "--batches=2", "--batch=2", "--threads=1", "--source=scenes:9:112x112"]
    report = run(capsys, *argv)["pipeline"]
    cores = report["cpu_ms_per_prompt"] * report["prompts_per_s"] / 1e3  # that are busy
    assert 0.05 < cores <= (os.cpu_count() or 1)
    assert report["wait_share"] > 0.9 and report["prompts_per_s"] <= report["images_per_s"]
    waited = run(capsys, *argv, "--step-seconds=1")["pipeline"]
    assert waited["step_seconds"] == 1 and waited["wait_share"] < 0.9


@pytest.mark.parametrize("flag", ["--repeats=0", "--batch=0", "--threads=0", "--workers=-1"])
def test_numbers_out_of_range_are_refused(flag: str):
    with pytest.raises(UserError, match=flag.split("=")[0]):
        bench.main(["tasks", "--repeats=1", "--source=scenes:4", flag])


def test_padding_of_a_config(capsys: pytest.CaptureFixture):
    """Of groups of a prompt of 36 tokens and eight samples, of which each row holds one."""
    argv = [f"--config={ROOT / 'configs' / 'tiny.py'}", "--steps=5", "--source=scenes:6:112x112"]
    argv += ["--mean=32", "--spread=0", "--config.grpo.micro_batch_rows=16"]
    argv += ["--config.grpo.row_patches=128,320", "--config.grpo.row_responses=256,384"]
    report = run_command(capsys, "padding", *argv, "--config.grpo.row_tokens=456,456")
    assert report["config"] == "tiny" and report["steps"] == 5
    assert report["prompt_tokens_mean"] == 36
    drawn = report["drawn"]
    assert drawn["token_padding_share"] == pytest.approx(1 - (36 + 8 * 32) / 456, abs=1e-4)
    assert drawn["flops_ratio"] > 1 and drawn["programs"] == 1
    assert drawn["patch_padding_share"] == 0.5
    # Rows of 300 tokens are enough for these groups, and for those of the tasks' own responses.
    short = run_command(capsys, "padding", *argv, "--config.grpo.row_tokens=300,456")
    assert short["drawn"]["token_padding_share"] == pytest.approx(1 - 292 / 300, abs=1e-4)
    for found, row in ((report, 456), (short, 300)):
        padding = found["synthetic"]["token_padding_share"]
        assert padding == pytest.approx(1 - (36 + 8 * 22) / row, abs=1e-4)


def test_drawn_responses_are_as_spread_as_asked(capsys: pytest.CaptureFixture):
    argv = [f"--config={ROOT / 'configs' / 'tiny.py'}", "--source=scenes:6:112x112", "--mean=12"]
    argv += ["--steps=20", "--spread=0.5"]
    alike, apart = (
        run_command(capsys, "padding", *argv, f"--correlation={x}")["drawn"] for x in (1, 0)
    )
    assert alike["response_tokens_mean"] == pytest.approx(12, rel=0.1)
    assert alike != apart
    with pytest.raises(UserError, match="--correlation between 0 and 1"):
        bench.main(["padding", *argv, "--correlation=1.5"])


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture):
    tiny = f"--config={ROOT / 'configs' / 'tiny.py'}"
    with pytest.raises(UserError, match="--stepps=3 is no option"):
        bench.main(["padding", tiny, "--stepps=3"])
    with pytest.raises(SystemExit):
        bench.main(["tasks", "--config.grpo.steps=3"])
    assert "unrecognized arguments: --config.grpo.steps=3" in capsys.readouterr().err


def test_the_command_itself_imports_no_pipeline():
    code = (
        "import sys, spatial_ssrl_jax.bench; "
        "assert not {'grain', 'tensorflow_datasets', 'jax'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
