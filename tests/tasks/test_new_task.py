"""BUILD.md's walk-through: its task works everywhere as one file and one entry of the tuple."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

START = """
import sys
import turn
import spatial_ssrl_jax.tasks as tasks
tasks.TASKS = (*tasks.TASKS, turn.TASK)
tasks.TASKS_BY_NAME[turn.TASK.name] = turn.TASK
"""
PREVIEW = """
from spatial_ssrl_jax import preview
preview.main(["--source=scenes:3:96x96", "--tasks=turn", "--out=look", "--count=6"])
"""
ITEM = """
from spatial_ssrl_jax.config.load import load_config
from spatial_ssrl_jax.data.items import item_dataset
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.rl.rewards import score_response
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.tasks.protocol import response_text

weights = [(f"tasks.{name}.weight", str(float(name == "turn"))) for name in tasks.TASKS_BY_NAME]
config = load_config(sys.argv[1], weights)
assert config.trained_tasks == ("turn",)
model, source = open_model(config.model.path), open_source("scenes:3:96x96")
processor = Processor(model.files, model.config)
example = item_dataset(source, range(3), config.tasks, processor, 0)[0].example
assert example.task == "turn"
text = response_text(example.reason, example.answer)
assert score_response(text, 9, example, config.reward).overall == 1.0
"""


def walk_through() -> str:
    """The task's file as BUILD.md has it."""
    section = (ROOT / "BUILD.md").read_text().split("## How to add a task")[1]
    return section.split("```python\n")[1].split("```")[0]


def run(folder: Path, code: str, *argv: str) -> None:
    (folder / "turn.py").write_text(walk_through())
    command = [sys.executable, "-c", START + code, *argv]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"}
    subprocess.run(command, cwd=folder, check=True, env=environment)


def test_the_walk_throughs_task_is_previewed(tmp_path: Path):
    run(tmp_path, PREVIEW)
    rows = [json.loads(line) for line in (tmp_path / "look" / "examples.jsonl").open()]
    assert len(rows) == 6
    for row in rows:
        assert row["task"] == "turn" and row["answer"] == str(90 * row["truth"]["quarters"])


def test_the_walk_throughs_task_is_configured_mixed_and_rewarded(tmp_path: Path):
    run(tmp_path, ITEM, str(ROOT / "configs" / "tiny.py"))
