"""A run's folder: what it refuses, what a resume notices, and that one run at a time has it."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax import train as command
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.lock import locked
from spatial_ssrl_jax.common.outputs import claim_output_folder
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.trainer.context import open_components
from spatial_ssrl_jax.trainer.preflight import preflight
from spatial_ssrl_jax.trainer.run_inputs import RunInputs, check_same_inputs
from spatial_ssrl_jax.trainer.training import train
from spatial_ssrl_jax.trainer.workdir import check_workdir, claim_workdir
from tests.helpers.images import photo

Make = Callable[..., c.Config]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(photo(number, 64, 64)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def config(toy_config: Make, taught: Path, photos: Path, tmp_path: Path) -> c.Config:
    """A run over a copy of the taught toy and a folder of photos."""
    model = tmp_path / "model"
    shutil.copytree(taught / "export", model)
    config = toy_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(model)),
        data=dataclasses.replace(config.data, source=f"folder:{photos}", heldout_fraction=0.3),
    )


def inputs_of(config: c.Config) -> RunInputs:
    components = open_components(config)
    return RunInputs.of(config, components.model, components.source)


@pytest.mark.parametrize("what", ["model", "photos", "init_from"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_holds_what_the_run_reads_is_refused(
    config: c.Config, taught: Path, tmp_path: Path, what: str, overwrite: bool
):
    """With no advice that would delete it."""
    workdir = tmp_path / what
    if what == "init_from":
        workdir = taught
        config = dataclasses.replace(
            config,
            sft=c.SftSettings(steps=0),
            grpo=dataclasses.replace(config.grpo, init_from=str(taught / "checkpoints" / "110")),
        )
    before = sorted(workdir.rglob("*"))
    for check in (preflight, train):
        with pytest.raises(UserError, match="holds what is read") as caught:
            check(config, workdir, overwrite)
        assert "--overwrite" not in str(caught.value)
    assert sorted(workdir.rglob("*")) == before


def test_everything_that_a_run_reads_is_an_input(config: c.Config, photos: Path, tmp_path: Path):
    (tmp_path / "linked").mkdir()
    (photos / "more").symlink_to(tmp_path / "linked")
    shutil.copy(photos / "00.png", tmp_path / "linked" / "a.png")
    (tmp_path / "answers").mkdir()
    shutil.copy(photos / "00.png", tmp_path / "answers" / "00.png")
    responses = tmp_path / "sft.json"
    row = {
        "instruction": "one patch is flipped",
        "output": "<think>x</think>\\boxed{1-0}",
        "images": ["answers/00.png"],
    }
    responses.write_text(json.dumps([row]))
    config = dataclasses.replace(
        config,
        sft=dataclasses.replace(config.sft, responses=str(responses)),
        eval=dataclasses.replace(config.eval, benchmark_data=str(tmp_path / "blink.tsv")),
    )
    model, source = open_model(config.model.path), open_source(config.data.source)
    found = {str(path) for path in RunInputs.of(config, model, source).paths}
    for name in ("model", "photos", "linked", "answers", "blink.tsv"):
        assert str(tmp_path / name) in found, name


def test_linked_photos_are_inputs_too(photos: Path, tmp_path: Path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(photos / "00.png")
    assert str(photos / "00.png") in open_source(f"folder:{tmp_path / 'links'}").inputs


def test_a_folder_that_holds_the_config_file_is_refused(tmp_path: Path):
    path = tmp_path / "run" / "config.py"
    path.parent.mkdir()
    path.write_text(
        "from spatial_ssrl_jax.config import Config\nget_config = lambda: Config('x')\n"
    )
    for more in (["--overwrite"], ["--check"], []):
        with pytest.raises(UserError, match=r"holds what is read \(.*config\.py\)"):
            command.main([f"--config={path}", f"--workdir={path.parent}", *more])
    assert path.exists()


def test_a_second_run_is_refused_while_the_first_lives(
    config: c.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("spatial_ssrl_jax.common.lock._HERE_SECONDS", 0.1)
    workdir = tmp_path / "run"
    claim_workdir(config, workdir, False, inputs_of(config))
    before = {p: p.stat().st_mtime_ns for p in workdir.iterdir()}
    with locked(workdir, print):
        for check in (preflight, train):
            for overwrite in (False, True):
                with pytest.raises(UserError, match="is in use"):
                    check(config, workdir, overwrite)
    after = {p: p.stat().st_mtime_ns for p in workdir.iterdir() if p.name != ".lock"}
    assert after == before


def test_a_resume_notices_other_weights_and_other_photos(config: c.Config, tmp_path: Path):
    workdir = tmp_path / "run"
    claim_workdir(config, workdir, False, inputs_of(config))
    assert check_workdir(config, workdir, False, inputs_of(config))
    weights = Path(config.model.path) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    said = rf"began with other content of model\.path \({config.model.path}\): put the old"
    for check in (preflight, train):
        with pytest.raises(UserError, match=said):
            check(config, workdir)
    data[-1] ^= 1
    weights.write_bytes(data)
    check_workdir(config, workdir, False, inputs_of(config))
    other = tmp_path / "photos" / "03.png"
    Image.fromarray(photo(77, 64, 64)).save(other)
    with pytest.raises(UserError, match=r"other content of data\.source \(folder:"):
        check_workdir(config, workdir, False, inputs_of(config))
    other.unlink()
    with pytest.raises(UserError, match=r"other content of data\.source \(folder:"):
        check_workdir(config, workdir, False, inputs_of(config))


def test_a_run_of_a_version_with_another_split_is_refused(config: c.Config, tmp_path: Path):
    check_same_inputs(tmp_path, config, RunInputs([], {}))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="of an earlier version, which held out other images"):
        check_same_inputs(tmp_path, config, RunInputs([], {}))


def test_a_folder_within_the_photos_is_none_of_them(photos: Path):
    source = open_source(f"folder:{photos}")
    claim_output_folder(photos / "run", False)
    (photos / "run" / "rollouts").mkdir()
    shutil.copy(photos / "00.png", photos / "run" / "rollouts" / "0.png")
    again = open_source(f"folder:{photos}")
    assert again.files == source.files and again.fingerprint() == source.fingerprint()


def test_images_given_by_path_have_a_fingerprint(photos: Path, tmp_path: Path):
    row = {
        "instruction": "one patch is flipped",
        "output": "<think>x</think>\\boxed{1-0}",
        "images": ["photos/00.png"],
    }
    (tmp_path / "sft.json").write_text(json.dumps([row]))
    before = open_source(f"ssrl81k:{tmp_path / 'sft.json'}").fingerprint()
    shutil.copy(photos / "01.png", photos / "00.png")
    assert open_source(f"ssrl81k:{tmp_path / 'sft.json'}").fingerprint() != before


def refused(before: c.Config, after: c.Config, folder: Path) -> str:
    """The setting for which a run of one config does not resume with another; "" if it does."""
    inputs = RunInputs([], {})
    claim_workdir(before, folder / "run", False, inputs)
    try:
        assert check_workdir(after, folder / "run", False, inputs)
    except UserError as error:
        (setting,) = re.findall(r"another config \((\S+) changed\)", str(error))
        return setting
    return ""


@pytest.mark.parametrize(
    ("changes", "resumes"),
    [
        ({}, True),
        ({"schedule": "cosine"}, False),
        ({"warmup_ratio": 0.1}, False),
        ({"kl_schedule": "linear"}, False),
    ],
)
def test_more_steps_are_the_same_run_unless_a_schedule_follows_them(
    config: c.Config, tmp_path: Path, changes: dict, resumes: bool
):
    grpo = dataclasses.replace(config.grpo, **changes)
    before = dataclasses.replace(config, grpo=grpo)
    after = dataclasses.replace(config, grpo=dataclasses.replace(grpo, steps=grpo.steps + 1))
    assert refused(before, after, tmp_path) == ("" if resumes else "grpo.steps")


@pytest.mark.parametrize(
    ("section", "key", "value", "resumes"),
    [
        ("data", "max_bad_fraction", 0.5, True),
        ("reward", "max_failed_fraction", 0.5, True),
        ("compile", "cache", "none", True),
        ("reward", "timeout", 60.0, True),
        ("reward", "workers", 2, True),
        ("rollout", "batch_prompts", 2, True),
        ("rollout", "prefill_prompts", 2, True),
        ("reward", "accuracy_weight", 0.5, False),
        ("data", "heldout_fraction", 0.2, False),
    ],
)
def test_what_rounds_alone_or_a_stopped_run_is_told_to_raise_may_change(
    config: c.Config, tmp_path: Path, section: str, key: str, value: float, resumes: bool
):
    changed = dataclasses.replace(getattr(config, section), **{key: value})
    after = dataclasses.replace(config, **{section: changed})
    assert refused(config, after, tmp_path) == ("" if resumes else f"{section}.{key}")
