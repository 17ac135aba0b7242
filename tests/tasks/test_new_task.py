"""BUILD.md's walk-through: its task works everywhere from a config file."""

import json
from pathlib import Path

import pytest

from spatial_ssrl_jax.tasks import TASKS
from tests.conftest import ROOT
from tests.helpers.commands import run_command

CONFIG = """
def get_config():
    return replace(tiny_config(), extra_tasks=(TASK,))
"""
RUN = [
    *(f"--config.tasks.{task.name}.weight=0" for task in TASKS),
    "--config.tasks.turn.weight=1",
    "--config.data.source=scenes:40:96x96",
    "--config.data.heldout_fraction=0.2",
    "--config.data.prompt_buckets=(200,)",
    "--config.data.patch_buckets=(320,)",
    "--config.data.workers=2",
    "--config.eval.examples=1",
    "--config.eval.samples=1",
    "--config.eval.batch_prompts=2",
    "--config.grpo.prompts=2",
    "--config.grpo.group_size=2",
    "--config.grpo.micro_batch_rows=2",
    "--config.rollout.batch_prompts=2",
    "--config.sft.steps=0",
    "--config.grpo.steps=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the task of BUILD.md in a config file."""
    path = tmp_path_factory.mktemp("own")
    section = (ROOT / "BUILD.md").read_text().split("## How to add a task")[1]
    task = section.split("```python\n")[1].split("```")[0]
    tiny = (ROOT / "configs" / "tiny.py").read_text().replace("def get_config", "def tiny_config")
    (path / "own.py").write_text(f"{tiny}\n{task}\n{CONFIG}")
    return path


def run(folder: Path, command: str, *argv: str) -> str:
    found = run_command(folder, command, "--config=own.py", *argv)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_the_walk_throughs_task_is_previewed(folder: Path):
    run(folder, "preview", "--source=scenes:3:96x96", "--tasks=turn", "--out=look", "--count=6")
    rows = [json.loads(line) for line in (folder / "look" / "examples.jsonl").open()]
    assert len(rows) == 6
    for row in rows:
        assert row["task"] == "turn" and row["answer"] == str(90 * row["truth"]["quarters"])


def test_it_trains_with_workers_is_held_out_and_resumes(folder: Path):
    run(folder, "train", *RUN, "--workdir=run")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    assert rows[-1]["task/turn/count"] == 2
    assert 0 <= rows[-1]["heldout/turn/accuracy_greedy"] <= 1
    config = json.loads((folder / "run" / "config.json").read_text())
    assert "np.rot90" in config["extra_tasks"][0]["make"]["source"]["make"]
    more = "--config.grpo.steps=2"
    assert "resum" in run(folder, "train", *RUN, more, "--workdir=run")


def test_a_task_that_has_changed_is_named(folder: Path):
    text = (folder / "own.py").read_text()
    (folder / "own.py").write_text(text.replace("rng.integers(1, 4)", "rng.integers(1, 3)"))
    found = run_command(folder, "train", "--config=own.py", *RUN, "--workdir=run")
    assert found.returncode == 2
    assert "extra_tasks" in found.stderr and "changed" in found.stderr
