"""BUILD.md's page on own questions and rewards, from a folder to a trained model."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax.tasks.protocol import response_text
from tests.conftest import ROOT
from tests.helpers.commands import run_command

PAGE = (ROOT / "BUILD.md").read_text().split("## Your own questions and rewards")[1]
PAGE = PAGE.split("\n## ")[0]
CONFIG = """
from dataclasses import replace

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.tasks.answers import last_box, number

{reward}

def get_config():
    tiny = c.load_config({tiny!r})
    return replace(tiny, reward=c.RewardSettings(rule="numeric", function=reward, workers=1))
"""
SMALL = [
    "--config.data.source=questions:mine",
    "--config.data.heldout_fraction=0.3",
    "--config.data.prompt_buckets=(400,)",
    "--config.data.patch_buckets=(320,)",
    "--config.data.workers=2",
    "--config.sft.responses=questions:mine",
    "--config.sft.steps=1",
    "--config.sft.prompts=4",
    "--config.sft.row_tokens=448",
    "--config.sft.row_patches=320",
    "--config.sft.micro_batch_rows=1",
    "--config.grpo.steps=2",
    "--config.grpo.prompts=4",
    "--config.grpo.group_size=2",
    "--config.grpo.micro_batch_rows=2",
    "--config.rollout.batch_prompts=4",
    "--config.checkpoint.every=1",
    "--config.log.rollouts_every=1",
    "--config.eval.examples=2",
    "--config.eval.samples=1",
    "--config.eval.batch_prompts=2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The page's rows, and more of their kind, with responses."""
    path = tmp_path_factory.mktemp("own")
    (path / "mine" / "images").mkdir(parents=True)
    shown = PAGE.split("```json\n")[1].split("```")[0]
    rows = [json.loads(line) for line in shown.splitlines()]
    rows += [
        {
            "problem": "<image>How many cubes are there?",
            "answer": str(i),
            "images": [f"images/{i}.png"],
            "response": response_text("I count them.", str(i)),
            "task": "cubes",
        }
        for i in range(12)
    ]
    rng = np.random.default_rng(0)
    for row in rows:
        for name in row.get("images", ()):
            pixels = rng.integers(0, 256, (84, 84, 3), np.uint8)
            Image.fromarray(pixels).save(path / "mine" / name)
    lines = [json.dumps(row) for row in rows] + ['{"problem": "no answer"}']
    (path / "mine" / "train.jsonl").write_text("\n".join(lines))
    (reward,) = re.findall(r"```python\n(def reward.*?)```", PAGE, re.DOTALL)
    tiny = str(ROOT / "configs" / "tiny.py")
    (path / "own.py").write_text(CONFIG.format(reward=reward, tiny=tiny))
    return path


def test_the_page(folder: Path):
    found = run_command(folder, "preview", "--source=questions:mine", "--out=look", "--count=15")
    assert found.returncode == 0, found.stderr
    rows = [json.loads(line) for line in (folder / "look" / "examples.jsonl").open()]
    assert {row["task"] for row in rows} == {"questions"} and len(rows) == 15
    found = run_command(folder, "train", "--config=own.py", *SMALL, "--check", "--workdir=run")
    assert found.returncode == 0, found.stderr
    assert "question 15 of mine/train.jsonl: it has no answer" in " ".join(found.stdout.split())
    found = run_command(folder, "train", "--config=own.py", *SMALL, "--workdir=run")
    assert found.returncode == 0, found.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    last = rows[-1]
    assert last["step"] == 3 and last["reward/failed_share"] == 0
    assert {"reward/part/boxed", "reward/part/near", "task/questions_cubes/accuracy"} <= last.keys()
    assert "heldout/questions/accuracy_greedy" in last
    assert (folder / "run" / "export" / "config.json").is_file()
    rollout = json.loads(
        next((folder / "run" / "rollouts").glob("*.jsonl")).read_text().split("\n")[0]
    )
    assert rollout["responses"][0]["parts"].keys() == {"boxed", "near"}
    config = json.loads((folder / "run" / "config.json").read_text())
    assert "def reward" in config["reward"]["function"]["source"]["reward"]


def test_a_changed_reward_is_named(folder: Path):
    text = (folder / "own.py").read_text()
    (folder / "own.py").write_text(text.replace("1.0 - error", "0.5 - error"))
    found = run_command(folder, "train", "--config=own.py", *SMALL, "--workdir=run")
    assert found.returncode == 2
    assert "reward.function.source.reward changed" in " ".join(found.stderr.split())


def test_a_reward_that_fails_is_refused_before_the_run(folder: Path):
    (folder / "bad.py").write_text(
        "def reward(response, answer, example, tokens):\n    return 1 / 0\n"
    )
    argv = [*SMALL, "--config.reward.function=bad.py:reward", "--workdir=bad"]
    found = run_command(folder, "train", "--config=own.py", *argv)
    assert found.returncode == 2
    assert "reward.function fails for a right response to a questions question" in " ".join(
        found.stderr.split()
    )
