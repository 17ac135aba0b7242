"""What goes wrong around a long run: numbers, images, sources, disks and clocks."""

import errno
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.common import retry
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.paths import partial_name
from spatial_ssrl_jax.data.images import image_size, open_source_image
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.monitoring import metrics as metrics_file
from spatial_ssrl_jax.monitoring.metrics import read_metrics
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.trainer import stage_steps
from spatial_ssrl_jax.trainer.training import train
from tests.helpers.images import photo
from tests.helpers.toy_runs import ROWS
from tests.trainer.test_training import figures, weights

SIZE = (120, 160)  # of the photos: height, width
Short = Callable[..., c.Config]


@pytest.fixture(scope="module")
def short(toy_config) -> Short:
    """SFT of six steps, or of another length, and nothing else."""

    def make(steps: int = 6, every: int = 2, **sections) -> c.Config:
        sft = c.SftSettings(steps=steps, learning_rate=1e-3, **ROWS)
        defaults = {
            "grpo": c.GrpoSettings(steps=0),
            "eval": c.EvalSettings(examples=2, samples=2, batch_prompts=8),
            "checkpoint": c.CheckpointSettings(every=every, keep=2),
        }
        return toy_config(sft=sft, **(defaults | sections))

    return make


@pytest.fixture(scope="module")
def whole(short: Short, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that nothing went wrong in."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train(short(), workdir)
    return workdir


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Makes the gradients of some optimizer steps, by number from 1, NaN."""
    original, count = stage_steps.train_step, iter(range(1, 1000))

    def step(loss, optimizer, state, batches):
        if next(count) in calls:
            spoiled = [jax.tree.map(lambda x: x, b) for b in batches]
            for batch in spoiled:
                object.__setattr__(batch, "weight", batch.weight * np.nan)
            batches = spoiled
        return original(loss, optimizer, state, batches)

    monkeypatch.setattr(stage_steps, "train_step", step)


def column(workdir: Path, name: str) -> list:
    return [row[name] for row in read_metrics(workdir) if row["step"]]


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(
    short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    poison(monkeypatch, {3})
    assert train(short(), tmp_path / "run")
    assert "1 optimizer steps were skipped" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 1
    assert column(tmp_path / "run", "optim/skipped") == [0, 0, 1, 0, 0, 0]
    norms = column(tmp_path / "run", "optim/gradient_norm")
    assert norms[2] is None and all(norm > 0 for norm in norms[:2] + norms[3:])
    assert all(np.isfinite(x).all() for x in weights(tmp_path / "run"))


def test_several_in_a_row_stop_the_run_with_its_state_kept(
    short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = short(every=100, optim=c.OptimSettings(eps=1e-2, max_skipped_steps=2))
    with monkeypatch.context() as patch:
        poison(patch, {2, 4, 5})
        with pytest.raises(UserError, match=r"2 .* in a row .*step 5 is saved\): lower the learn"):
            train(config, tmp_path / "run")
    assert column(tmp_path / "run", "optim/skipped") == [0, 1, 0, 1, 1]
    assert train(config, tmp_path / "run")
    assert column(tmp_path / "run", "optim/skipped") == [0, 1, 0, 1, 1, 0]


def test_a_run_without_any_step_blames_the_weights_that_it_starts_from(
    short: Short, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poison(monkeypatch, {1, 2})
    with pytest.raises(UserError, match="2 .* in a row .*check the weights that the stage starts"):
        train(short(steps=2), tmp_path / "run")
    assert not (tmp_path / "run" / "export").exists()


def save_photos(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        Image.fromarray(photo(number, *SIZE)).save(folder / f"{number:02d}.png")


def test_a_tenth_of_the_images_is_unreadable(
    short: Short, tmp_path: Path, capsys: pytest.CaptureFixture
):
    save_photos(tmp_path / "photos", 30)
    for number in (7, 17, 27):
        path = tmp_path / "photos" / f"{number:02d}.png"
        path.write_bytes(path.read_bytes()[: 40 * number])
    data = c.DataSettings(**(vars(short().data) | {"source": f"folder:{tmp_path / 'photos'}"}))
    assert train(short(data=data), tmp_path / "run")
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    assert skipped and all(line.split()[1] in ("07.png:", "17.png:", "27.png:") for line in skipped)
    assert sum(column(tmp_path / "run", "prompt/dropped")) == len(skipped) < 10


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of a few hundredths of a second, and every message."""
    monkeypatch.setattr(retry, "RETRY_DELAYS", (0.05,) * 6)
    monkeypatch.setattr(retry, "_WARN_EVERY", 0.0)


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_folder_that_is_away_for_a_while_is_waited_for(
    tmp_path: Path, quick, caplog: pytest.LogCaptureFixture, how: str
):
    save_photos(tmp_path / "photos", 3)
    source = open_source(f"folder:{tmp_path / 'photos'}")
    (tmp_path / "photos").rename(tmp_path / "away")
    if how == "empty":  # as the place is left when a disk is unmounted
        (tmp_path / "photos").mkdir()
    back = threading.Timer(0.12, os.replace, (tmp_path / "away", tmp_path / "photos"))
    back.start()
    assert source[1].image.shape == (*SIZE, 3)
    back.join()
    assert 1 <= len(caplog.messages) <= 4
    assert "01.png cannot be read (No such file" in caplog.text
    assert "trying again in" in caplog.text


def test_a_folder_that_stays_away_ends_the_run_with_a_sentence(tmp_path: Path, quick):
    save_photos(tmp_path / "photos", 3)
    source = open_source(f"folder:{tmp_path / 'photos'}")
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(UserError, match="photos is missing or empty .* mount it again") as error:
        source.size(0)
    assert not isinstance(error.value, BadImage)


class Failing:
    """Raises an `OSError` of each number in turn, then calls the original."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where, name: str, *numbers: int):
        self.original, self.numbers, self.calls = getattr(where, name), list(numbers), 0
        monkeypatch.setattr(where, name, self)

    def __call__(self, *args, **options):
        self.calls += 1
        if self.numbers:
            number = self.numbers.pop(0)
            raise OSError(number, os.strerror(number))
        return self.original(*args, **options)


PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT)


def test_errors_of_a_network_disk_are_tried_again(
    tmp_path: Path, quick, monkeypatch: pytest.MonkeyPatch
):
    save_photos(tmp_path / "photos", 2)
    path = tmp_path / "photos" / "00.png"
    opened = Failing(monkeypatch, Image, "open", *PASSING)
    assert image_size(path) == SIZE[::-1] and opened.calls == 4
    listed = Failing(monkeypatch, os, "scandir", *PASSING)
    assert len(open_source(f"folder:{path.parent}")) == 2 and listed.calls == 4
    stat = Failing(monkeypatch, os, "stat", errno.ESTALE)
    assert len(open_source(f"folder:{path.parent}")) == 2 and stat.calls > 1


def test_a_file_that_alone_stays_unreadable_is_a_bad_image(
    tmp_path: Path, quick, monkeypatch: pytest.MonkeyPatch
):
    save_photos(tmp_path / "photos", 2)
    opened = Failing(monkeypatch, Image, "open", *[errno.EIO] * 7)
    with pytest.raises(BadImage, match="00.png: cannot be read .*Input/output error"):
        open_source_image(tmp_path / "photos" / "00.png")
    assert opened.calls == 7


def test_a_missing_file_and_a_missing_folder_of_a_typo_are_not_waited_for(tmp_path: Path):
    save_photos(tmp_path / "photos", 1)
    begun = time.monotonic()
    with pytest.raises(BadImage, match="there is no such file"):
        open_source_image(tmp_path / "photos" / "07.png")
    with pytest.raises(UserError, match="there is no such folder"):
        open_source(f"folder:{tmp_path / 'fotos'}")
    assert time.monotonic() - begun < retry.RETRY_DELAYS[0]


def test_no_room_for_rollouts_and_report_does_not_stop_training(
    toy_config, tmp_path: Path, capsys: pytest.CaptureFixture
):
    grpo = c.GrpoSettings(
        steps=2,
        prompts=8,
        minibatches_per_rollout=1,
        group_size=3,
        micro_batch_rows=8,
        learning_rate=1e-3,
    )
    config = toy_config(
        sft=c.SftSettings(),
        grpo=grpo,
        log=c.LogSettings(rollouts_every=1, rollouts_count=1, report_every=1),
        eval=c.EvalSettings(examples=2, samples=2, batch_prompts=8),
    )
    run = tmp_path / "run"
    _claimed(config, run)
    (run / "rollouts").mkdir()
    samples = [run / "rollouts" / f"step_00000{i}.jsonl" for i in (1, 2)]
    full = [partial_name(path) for path in (run / "report.html", *samples)]
    for path in full:
        path.symlink_to("/dev/full")  # every write to it fails as on a full disk
    assert train(config, run)
    out = capsys.readouterr().out
    for what in ("rollouts", "report.html"):
        assert out.count(f"{run / what} cannot be written (No space left on device)") == 1
    assert len(column(run, "reward/overall_mean")) == 2 and (run / "summary.json").is_file()
    assert not (run / "report.html").exists()


def _claimed(config: c.Config, workdir: Path) -> None:
    """Makes a folder that the run of `config` takes for its own."""
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(c.to_dict(config)))


@pytest.mark.parametrize("which", ["metrics.jsonl", "events"])
def test_no_room_for_metrics_stops_and_the_same_command_resumes(
    short: Short, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
):
    class Full(metrics_file.MetricsWriter):
        def write(self, stage: str, step: int, values: dict[str, float]) -> None:
            if step == 5 and which == "metrics.jsonl":
                self._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
            elif step == 5:
                full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb")
                self._events._writer._py_recordio_writer._writer = full
            super().write(stage, step, values)

    with monkeypatch.context() as patch:
        patch.setattr("spatial_ssrl_jax.trainer.context.MetricsWriter", Full)
        with pytest.raises(UserError, match=r"step 5 .*metrics.jsonl \(No space left .*resumes"):
            train(short(), tmp_path / "run")
    assert train(short(), tmp_path / "run")
    assert figures(tmp_path / "run") == figures(whole)


class JumpingClock:
    """A clock that is set forwards and back by minutes whenever it is looked at, and once by more.

    Args:
      year: at look 200 it is set back by a year for good.
    """

    def __init__(self, year: bool = False):
        self.random, self.now, self.looks, self.year = random.Random(0), time.time, 0, year

    def __call__(self) -> float:
        self.looks += 1
        back = 365 * 86_400 if self.year and self.looks > 200 else 0
        return self.now() + self.random.uniform(-120, 120) - back


@pytest.mark.parametrize("year", [False, True], ids=["minutes", "a year"])
def test_a_clock_that_jumps_changes_nothing(
    short: Short, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, year: bool
):
    monkeypatch.setattr(time, "time", JumpingClock(year))
    assert train(short(), tmp_path / "run")
    assert figures(tmp_path / "run") == figures(whole)
    seconds = column(tmp_path / "run", "perf/step_seconds")
    assert all(0 < s < 600 for s in seconds)
    times = column(tmp_path / "run", "time")
    assert (max(times) - min(times) > 300 * 86_400) == year


def test_the_time_left_does_not_follow_the_clock(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "time", JumpingClock())
    with open(os.devnull, "w") as nowhere:
        progress = Progress(Console(file=nowhere, force_terminal=True))
        progress.start("sft", 10)
        for number in range(1, 6):
            time.sleep(0.02)
            progress.step(number, {})
        left = progress._bar.tasks[0].time_remaining
        progress.stop()
    assert left is not None and 0 <= left < 10
