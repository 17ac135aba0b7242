"""A long run is steady: no late compilation, no file left open, no growing memory."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.monitoring.metrics import read_metrics
from tests.helpers.processes import start_all
from tests.trainer.test_training import finish, start, write_config

_POLL = 0.05  # seconds between two counts of a run's open files
GROWTH = 1.05


def steady(toy_config, steps: int, every: int, **sections) -> c.Config:
    """GRPO alone, with all that a step may do: saves, rollouts, the report, held-out metrics.

    Caches have one width, and rows one size: others are programs of their own, compiled when they
    are first needed.
    """
    return toy_config(
        **sections,
        sft=c.SftSettings(),
        grpo=c.GrpoSettings(
            steps=steps,
            prompts=8,
            minibatches_per_rollout=1,
            group_size=3,
            row_tokens=(288,),
            row_patches=(320,),
            row_responses=(96,),
            micro_batch_rows=8,
            learning_rate=1e-4,
        ),
        rollout=c.RolloutSettings(max_new_tokens=32, kv_block=32, check_every=8, batch_prompts=8),
        checkpoint=c.CheckpointSettings(every=every, keep=2),
        log=c.LogSettings(rollouts_every=every, rollouts_count=2, report_every=every),
        eval=c.EvalSettings(examples=2, samples=2, every=every, batch_prompts=8),
    )


def metrics_of(folder: Path, config: c.Config, processes: int) -> list[dict]:
    """The metrics of a run's steps, in processes of their own."""
    path = write_config(folder, config)
    command = ["-m", "spatial_ssrl_jax.train", f"--config={path}", f"--workdir={folder / 'run'}"]
    finish(*start_all(command, processes))
    return [row for row in read_metrics(folder / "run") if row["step"]]


def watched(toy_config, folder: Path, steps: int, every: int) -> tuple[list[dict], dict[int, int]]:
    """Runs in a process of its own and counts its open files.

    Returns:
      The metrics of its steps, and at each step the fewest files seen open: a save under way holds
      some for a moment.
    """
    config = write_config(folder, steady(toy_config, steps, every))
    process = start(config, folder / "run", 1)
    opened: dict[int, int] = {}
    while process.poll() is None:
        rows = read_metrics(folder / "run")
        try:
            count = len(os.listdir(f"/proc/{process.pid}/fd"))
        except FileNotFoundError:  # it has just ended
            break
        if count and rows and rows[-1]["step"]:  # one that has just ended has none
            step = rows[-1]["step"]
            opened[step] = min(count, opened.get(step, count))
        time.sleep(_POLL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    return [row for row in read_metrics(folder / "run") if row["step"]], opened


def fewest(opened: dict[int, int], steps: range) -> int:
    """The fewest files seen open at any of some steps."""
    return min(opened[step] for step in steps if step in opened)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")


@needs_proc
def test_nothing_compiles_late_and_no_file_stays_open(toy_config, tmp_path: Path):
    rows, opened = watched(toy_config, tmp_path, 24, 4)
    assert {row["perf/compilations"] for row in rows} == {rows[0]["perf/compilations"]}
    assert fewest(opened, range(17, 25)) <= fewest(opened, range(5, 13))


def test_nothing_compiles_late_in_two_processes(toy_config, tmp_path: Path):
    """A program that is made anew for each batch would compile at every step."""
    config = steady(toy_config, 6, 2, mesh=c.MeshSettings(fsdp=2))
    rows = metrics_of(tmp_path, config, 2)
    counts = [row["perf/compilations"] for row in rows]
    assert counts[0] == counts[1]
    assert len(set(counts[2:])) == 1, counts  # the first save, at step 2, slices what is sharded


@needs_proc
@pytest.mark.slow
def test_three_hundred_steps_stay_flat(toy_config, tmp_path: Path):
    rows, opened = watched(toy_config, tmp_path, 300, 10)
    by_step = {row["step"]: row for row in rows}
    host = {}
    print("step  mean host memory (MB)  compilations  fewest open files, of the last ten steps")
    for step in (50, 100, 200, 300):
        ten = range(step - 9, step + 1)
        # One step's memory swings by a tenth.
        host[step] = np.mean([by_step[n]["memory/host_bytes"] for n in ten])
        count, files = by_step[step]["perf/compilations"], fewest(opened, ten)
        print(f"{step:4}  {host[step] / 1e6:21.1f}  {count:12.0f}  {files}")
    assert host[300] <= GROWTH * host[50]
    # At the last step grey images are measured too, and may end so that a batch shrinks.
    assert {row["perf/compilations"] for row in rows[:-1]} == {rows[0]["perf/compilations"]}
    assert fewest(opened, range(291, 301)) <= fewest(opened, range(41, 51))
