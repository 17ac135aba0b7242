"""Depth that may be inverse or upside down: `preview` and `--check` say so, with what to try."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax import preview
from spatial_ssrl_jax.data import depth_direction
from spatial_ssrl_jax.data.depth_direction import depth_warnings, lower_is_farther
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.tasks import TASKS, crop, depth, flip
from spatial_ssrl_jax.trainer.preflight import preflight
from tests.helpers.images import photo, room
from tests.helpers.toy_runs import make_config

SIZE = (112, 112)


def save(folder: Path, inverse: int, right: int, bad: int = 0) -> Path:
    """Rooms whose floor is near, of which some have inverse depth and some no image."""
    folder.mkdir()
    for number in range(inverse + right + bad):
        image = folder / f"{number}.png"
        if number < inverse + right:
            Image.fromarray(photo(number, *SIZE)).save(image)
        else:
            image.write_bytes(b"no image")
        depth = np.broadcast_to(np.linspace(8, 2, SIZE[0], dtype=np.float32)[:, None], SIZE)
        depth = depth + 0.2 * room(number, *SIZE)
        np.save(folder / f"{number}_depth.npy", 10 / depth if number < inverse else depth)
    return folder


@pytest.mark.parametrize(
    ("inverse", "right", "bad", "said"),
    [
        (0, 4, 0, None),
        (2, 2, 0, None),
        (3, 2, 0, "in 3 of 5 pictures"),
        (1, 0, 0, "in 1 of 1 pictures"),
        (20, 0, 0, "in 16 of 16 pictures"),  # no more are read
        (2, 0, 3, "in 2 of 2 pictures"),
        (10, 0, 12, "in 10 of 10 pictures"),  # others are tried in place of bad ones
    ],
)
def test_most_pictures_decide(tmp_path: Path, inverse: int, right: int, bad: int, said: str | None):
    spec = f"rgbd:{save(tmp_path / 'd', inverse, right, bad)}"
    found = depth_warnings(open_source(spec), [depth.TASK])
    assert [warning.partition(" of rgbd")[0] for warning in found] == ([said] if said else [])


def test_the_next_thing_to_try_solves_it(tmp_path: Path):
    spec = f"rgbd:{save(tmp_path / 'd', 3, 0)}"
    (warning,) = depth_warnings(open_source(spec), TASKS)
    assert spec in warning and "larger values are nearer, end its SPEC with ,depth=inv" in warning
    for option in (",depth=inverse", ",depth=relative-inverse"):
        assert depth_warnings(open_source(spec + option), TASKS) == []
    spec = f"rgbd:{save(tmp_path / 'e', 0, 3)},depth=inverse"
    (warning,) = depth_warnings(open_source(spec), TASKS)
    assert "larger values are farther, leave depth= out of its SPEC" in warning


def test_parts_that_serve_no_depth_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save(tmp_path / "d", 3, 0)
    spec = f"flip@rgbd:{folder}+folder:{folder}+scenes:9"
    read = []
    monkeypatch.setattr(depth_direction, "_farther_below", lambda part: read.append(part) or [])
    assert depth_warnings(open_source(spec), TASKS) == [] and read == []
    both = open_source(f"{spec}+depth@rgbd:{folder}")
    depth_warnings(both, [flip.TASK, crop.TASK])
    assert read == []
    depth_warnings(both, TASKS)
    assert read == [both.parts[-1]]


@pytest.mark.parametrize(
    ("rows", "farther"),
    [
        ([3, 2, 1], False),
        ([1, 2, 3], True),
        ([1, 1, 1], False),
        ([np.nan, np.nan, np.nan, np.nan, 3, 1], False),  # of the rows that have depth
        ([1, 3, np.nan, np.nan, np.nan, np.nan], True),
        ([2], False),
    ],
)
def test_thirds_are_of_the_rows_with_depth(rows: list[float], farther: bool):
    assert lower_is_farther(np.array(rows, np.float32)[:, None].repeat(3, 1)) == farther


def test_preview_warns(run: Callable, tmp_path: Path):
    source = f"--source=rgbd:{save(tmp_path / 'd', 2, 0)}"
    out = tmp_path / "p"
    argv = [source, f"--out={out}", "--count=2", "--overwrite"]
    code, printed, err = run(preview.main, *argv)
    assert code == 0 and "warning:" not in printed
    assert err.startswith("warning: in 2 of 2 pictures of rgbd:") and err.count("\n") == 1
    assert "<b>in 2 of 2 pictures of rgbd:" in (out / "index.html").read_text()
    code, printed, err = run(preview.main, *argv, "--json")
    assert (code, err) == (0, "") and len(json.loads(printed)["warnings"]) == 1
    assert run(preview.main, *argv, "--tasks=flip")[2] == ""
    assert run(preview.main, f"{source},depth=inverse", *argv[1:])[2] == ""


def test_check_warns_in_its_notes(toy_folder: Path, tmp_path: Path):
    config = make_config(c.ModelSettings(str(toy_folder), True, "float32", "none"))
    data = replace(config.data, source=f"rgbd:{save(tmp_path / 'd', 30, 0)}")
    longer = replace(config.rollout, max_new_tokens=48)
    config = replace(config, data=data, rollout=longer)
    assert not any("lower third" in note for note in preflight(config, tmp_path / "w")["notes"])
    tasks = config.tasks | {"depth": replace(config.tasks["depth"], weight=1.0)}
    notes = preflight(replace(config, tasks=tasks), tmp_path / "w")["notes"]
    assert [note for note in notes if note.startswith("in 16 of 16 pictures of rgbd:")]
