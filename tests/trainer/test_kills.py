"""Killed at any moment, saves included, a run ends as one that nothing interrupted, bit for bit."""

import dataclasses
import json
import os
import random
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.checkpoint.checksums import find_damage
from spatial_ssrl_jax.monitoring.metrics import read_metrics
from spatial_ssrl_jax.trainer.training import train
from tests.helpers.toy_runs import ROWS
from tests.trainer.test_training import figures, start, write_config

LONG_KILLS, LONG_CUTS = 20, (6, 13)  # after these kills a checkpoint is cut off
EXPORT_TRIES = 5  # kills that may miss an export
_LOOK = 0.002  # seconds between two looks at a run's folder


@dataclass(frozen=True)
class Kill:
    """When a run is killed.

    Attributes:
      event: `start` of the process, a `step` done, a save under way (`saving`), or the export
        (`exporting`).
      steps: how many steps after the newest checkpoint that is; not for `start`.
      seconds: waited from then on.
    """

    event: str
    steps: int
    seconds: float


@dataclass(frozen=True)
class Killed:
    """What a kill met: seconds from the start of the process, the newest step that it had done
    (None: not one), what it was doing, and the step that the next process resumes after."""

    seconds: float
    step: int | None
    doing: str
    goes_on_after: int


def killed_run(config: Path, workdir: Path, kills: Sequence[Kill], cuts: Sequence[int] = ()):
    """Starts a run again and again, killed at the given moments, the last time to its end.

    Args:
      config, workdir: the run's.
      kills: one a start; what is left when the run has come to its end is not used.
      cuts: kills, by number from 1, after which the newest checkpoint is cut off.

    Returns:
      The kills' `Killed`.
    """
    met: list[Killed] = []
    left, too_late = [*kills, None], 0
    while left:
        kill = left[0]
        whole, wall, begun = newest_whole(workdir), time.time(), time.monotonic()
        process = start(config, workdir, 1)
        while kill and process.poll() is None and not happened(kill, workdir, whole, wall):
            time.sleep(_LOOK)
        if kill:
            time.sleep(kill.seconds)
            process.kill()
        seconds = time.monotonic() - begun
        out, err = process.communicate(timeout=600)
        resumed = re.search(r"resuming after step (\d+)", out)
        assert int(resumed[1] if resumed else 0) in (
            {whole} if process.returncode == 0 else {whole, 0}
        )
        if process.returncode == 0:
            return met
        assert process.returncode == -9, out + err
        step, doing = state(workdir, wall)
        if kill and kill.event == "exporting" != doing and too_late < EXPORT_TRIES:
            too_late += 1  # the export of a small model takes milliseconds: it is begun again
            continue
        left.pop(0)
        if len(met) + 1 in cuts:
            cut_off(workdir)
        met.append(Killed(seconds, step, doing, newest_whole(workdir)))
    raise AssertionError("the last start was left alone and did not end")


def happened(kill: Kill, workdir: Path, whole: int, wall: float) -> bool:
    """Whether what a kill waits for has come in the process that was started at `wall`."""
    if kill.event == "start":
        return True
    if kill.event == "exporting":
        return exporting(workdir)
    step = fresh_step(workdir, wall)
    if step is None or step < whole + kill.steps:
        return False
    return kill.event == "step" or bool(unfinished(workdir))


def fresh_step(workdir: Path, wall: float) -> int | None:
    """The newest step that the process of `wall` has written to its metrics."""
    rows = [row for row in read_metrics(workdir) if row["time"] > wall and row["step"]]
    return rows[-1]["step"] if rows else None


def unfinished(workdir: Path) -> list[str]:
    """Checkpoints that have no name yet."""
    return sorted(path.name for path in (workdir / "checkpoints").glob("*tmp*"))


def exporting(workdir: Path) -> bool:
    """Whether a part of an export has no name yet."""
    return bool(list((workdir / "export").glob(".*.partial")))


def state(workdir: Path, wall: float) -> tuple[int | None, str]:
    step, saves = fresh_step(workdir, wall), unfinished(workdir)
    if step is None:
        return None, "starting"
    if exporting(workdir):
        return step, "exporting"
    return step, f"saving {saves[0].partition('.')[0]}" if saves else "training"


def newest_whole(workdir: Path) -> int:
    """The newest checkpoint that is as it was written, 0 where there is none."""
    found = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    return max((int(path.name) for path in found if find_damage(path) is None), default=0)


def cut_off(workdir: Path) -> None:
    """Halves the largest file of the newest checkpoint, if there is one."""
    if not (newest := newest_whole(workdir)):
        return
    folder = workdir / "checkpoints" / str(newest)
    files = [path for path in folder.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def assert_equal_runs(ours: Path, theirs: Path) -> None:
    assert figures(ours) == figures(theirs)
    exports = sorted((theirs / "export").glob("*.safetensors"))
    assert exports
    for file in exports:
        assert (ours / "export" / file.name).read_bytes() == file.read_bytes()
    heldout = [json.loads((run / "summary.json").read_text())["heldout"] for run in (ours, theirs)]
    assert heldout[0] == heldout[1]
    assert not unfinished(ours) and not exporting(ours)


def small(toy_config, sft: int, grpo: int, every: int, workers: int = 0) -> c.Config:
    """A run of both stages in which nearly all time goes into starting."""
    return toy_config(
        data=dataclasses.replace(toy_config().data, workers=workers),
        sft=c.SftSettings(steps=sft, learning_rate=1e-3, **ROWS),
        grpo=c.GrpoSettings(
            steps=grpo,
            prompts=8,
            minibatches_per_rollout=1,
            group_size=3,
            micro_batch_rows=8,
            learning_rate=1e-3,
        ),
        checkpoint=c.CheckpointSettings(every=every, keep=2),
        eval=c.EvalSettings(examples=2, samples=2, batch_prompts=8),
    )


def test_three_kills_and_a_truncated_checkpoint_change_nothing(toy_config, tmp_path: Path):
    config = small(toy_config, 2, 2, 1)
    kills = [Kill("saving", 2, 0.0), Kill("step", 2, 0.05), Kill("exporting", 0, 0.0)]
    met = killed_run(write_config(tmp_path, config), tmp_path / "run", kills, cuts=[3])
    assert len(met) == 3 and met[0].doing.startswith("saving") and met[2].doing == "exporting"
    assert list((tmp_path / "run" / "checkpoints").glob("damaged_*"))
    assert train(config, tmp_path / "whole")
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def drawn(rng: random.Random) -> Kill:
    """A kill at random: a third anywhere in the start, the others around steps and in saves."""
    event = rng.choice(["start", "step", "saving"])
    longest = {"start": 15.0, "step": 1.0, "saving": 0.4}[event]
    return Kill(event, rng.randint(1, 4), rng.uniform(0, longest))


def shared_memory() -> list[str]:
    return sorted(name for name in os.listdir("/dev/shm") if not name.startswith("sem."))


def multiprocessing_children() -> list[str]:
    """Command lines of worker processes on this machine that have lost their parent."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if "multiprocessing" in line and parent == "1":
                found.append(line)
    return found


def test_twenty_kills_change_nothing(toy_config, tmp_path: Path):
    """With two worker processes; no process and no shared memory is left."""
    config, shared = small(toy_config, 6, 14, 2, workers=2), shared_memory()
    assert train(config, tmp_path / "whole")
    rng = random.Random(0)
    kills = [*(drawn(rng) for _ in range(LONG_KILLS - 1)), Kill("exporting", 0, 0.0)]
    met: list[Killed] = []
    while len(met) < LONG_KILLS:  # a run that is done before its kills are is followed by another
        run, left = tmp_path / f"run_{len(met)}", [n - len(met) for n in LONG_CUTS]
        met += killed_run(write_config(tmp_path, config), run, kills[len(met) :], left)
        assert_equal_runs(run, tmp_path / "whole")
    assert met[-1].doing == "exporting"
    time.sleep(2)  # for what the last kill left to end
    assert multiprocessing_children() == [] and shared_memory() == shared
    print("kill  seconds after start  step reached  doing      restarted after step")
    for number, kill in enumerate(met, 1):
        reached = "-" if kill.step is None else kill.step
        print(
            f"{number:4}  {kill.seconds:19.2f}  {reached:>12}  {kill.doing:9}  {kill.goes_on_after}"
            + "  (the newest checkpoint cut off)" * (number in LONG_CUTS)
        )
