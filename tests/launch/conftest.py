"""A fake cloud: gcloud on PATH, and workers whose Python only pretends to train."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent

# A worker's Python: records its arguments; `train` behaves as the file `training` says.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$FAKE_CLOUD/python"
case $* in
  *device_count*) cat "$FAKE_CLOUD/chips" ;;
  -\\ *) cat >/dev/null; ! cat "$FAKE_CLOUD/probe" 2>/dev/null; exit ;;
  *spatial_ssrl_jax.train*)
    echo "step 1 of 2"
    source "$FAKE_CLOUD/training"
    ;;
esac
"""
COMPLETE = """mkdir -p "$FAKE_CLOUD/bucket/runs/grpo_3b" && cd "$_" && mkdir -p export metrics
echo {} | tee export/config.json summary.json report.html >events.out.tfevents.1
echo '{"step": 99, "stage": "sft", "loss/sft": 0.5}' >metrics/part_000001.jsonl
echo '{"step": 100, "stage": "grpo", "reward/overall_mean": 0.25}' >metrics/part_000002.jsonl
"""
HANGS = "trap 'echo saved; exit 0' TERM; while :; do sleep 0.05; done\n"
FAILS = "echo 'error: out of memory'; exit 2\n"


@dataclass(frozen=True)
class Cloud:
    """The fake cloud's folder, and running a script with it."""

    folder: Path

    def run(self, script: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs `launch/SCRIPT` with two tries and no pauses."""
        env = os.environ | {"FAKE_CLOUD": str(self.folder), "HOME": str(self.folder)}
        env["PATH"] = f"{self.folder / 'bin'}:{env['PATH']}"
        command = ["bash", str(ROOT / "launch" / script), *words]
        return subprocess.run(
            command, env=env, cwd=self.folder, capture_output=True, text=True, timeout=100
        )

    def tpu(self, verb: str, *flags: str) -> subprocess.CompletedProcess[str]:
        """Runs `launch/tpu.sh` with what has no default."""
        known = ["--project=p", "--zone=us-west4-a", "--bucket=b", "--wait=0", "--attempts=2"]
        return self.run("tpu.sh", verb, *known, f"--out={self.folder / 'out'}", *flags)

    def fault(self, match: str, err: str = "", **more) -> None:
        """From now on the calls that hold `match` fail, `times` times."""
        path = self.folder / "faults.json"
        faults = [*json.loads(path.read_text()), {"match": match, "err": err} | more]
        path.write_text(json.dumps(faults))

    def training(self, does: str) -> None:
        (self.folder / "training").write_text(does)

    def start(self, state: str) -> None:
        """A request is there already."""
        (self.folder / "state").write_text(state)

    @property
    def state(self) -> str | None:
        path = self.folder / "state"
        return path.read_text() if path.exists() else None

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def count(self, words: str) -> int:
        """How many calls hold `words`."""
        return sum(words in " ".join(call) for call in self.calls)

    def wait_for(self, words: str, workers: int = 2) -> None:
        """Returns when every worker's log holds `words`."""
        for _ in range(200):
            logs = [log.read_text() for log in self.folder.glob("worker*/job/log")]
            if sum(words in log for log in logs) == workers:
                return
            time.sleep(0.05)
        raise AssertionError(f"{words!r} is not in every log")


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    """A cloud that grants at once, with two workers whose training completes at once."""
    gcloud = (HERE / "fake_gcloud.py").read_text()
    write_script(tmp_path / "bin/gcloud", f"#!{sys.executable} -S\n{gcloud}")
    write_script(tmp_path / "bin/python", PYTHON)
    for worker in ("worker0", "worker1"):
        write_script(tmp_path / worker / "venv/bin/python", PYTHON)
    (tmp_path / "faults.json").write_text("[]")
    (tmp_path / "chips").write_text("16\n")
    (tmp_path / "bucket").mkdir()
    cloud = Cloud(tmp_path)
    cloud.training(COMPLETE)
    yield cloud
    for pid in tmp_path.glob("worker*/job/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue
