"""`train --check`: its sizes are the run's own, what it refuses, and that nothing is written."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from rich.console import Console

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax import train as command
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.processor import ImageArea
from spatial_ssrl_jax.monitoring.metrics import read_metrics
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings
from spatial_ssrl_jax.trainer import context
from spatial_ssrl_jax.trainer import preflight as check_module
from spatial_ssrl_jax.trainer.preflight import preflight
from spatial_ssrl_jax.trainer.preflight_report import print_report
from tests.helpers.toy_runs import make_config


@pytest.fixture
def fresh(toy_folder: Path) -> Callable[..., c.Config]:
    """Makes the config of a run of both stages from drawn weights."""
    return partial(make_config, c.ModelSettings(str(toy_folder), True, "float32", "none"))


def files(folder: Path) -> dict[str, float]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_the_sizes_are_those_of_the_run(taught_config: c.Config, taught: Path):
    found = preflight(taught_config, taught.parent / "new")
    row = next(row for row in read_metrics(taught) if row["step"] == 1)
    sft = found["stages"]["sft"]
    assert found["problems"] == [] and list(found["stages"]) == ["sft"]
    assert sft["prompt_tokens"] == pytest.approx(8 * row["prompt/length_mean"])
    assert sft["response_tokens"] == pytest.approx(8 * row["response/length_mean"])
    assert sft["padding_share"] == pytest.approx(row["perf/update_padding_share"], abs=1e-3)
    assert sft["checkpoint_bytes"] == checkpoint_bytes(taught / "checkpoints" / "110")
    assert found["seconds_left"] is None and not (taught.parent / "new").exists()


def checkpoint_bytes(step: Path) -> int:
    """Bytes of a step's arrays, without the files around them."""
    sizes = 0
    for item in ("params", "training"):
        tree = ocp.StandardCheckpointHandler().metadata(step / item).tree
        sizes += sum(int(np.prod(m.shape)) * m.dtype.itemsize for m in jax.tree.leaves(tree))
    return sizes


def test_sources_and_areas_are_those_of_the_config(fresh, tmp_path: Path):
    spec = "shuffle@scenes:30:112x112+flip@scenes:20:112x112+flip@3*scenes:30:112x112"
    config = fresh()
    data = dataclasses.replace(config.data, source=spec, min_pixels=99, max_pixels=9999)
    config = dataclasses.replace(config, data=data)
    report = preflight(config, tmp_path / "w")
    assert report["source"]["shares"] == {
        "shuffle": {"scenes:30:112x112": 1.0},
        "flip": {"scenes:20:112x112": 0.25, "scenes:30:112x112": 0.75},
    }
    console = Console(file=io.StringIO(), width=200)
    print_report(report, console)
    assert "25% scenes:20:112x112, 75% scenes:30:112x112" in console.file.getvalue()
    assert context.open_components(config).processor.area == ImageArea(99, 9999)
    data = dataclasses.replace(data, source=f"{spec}+crop@scenes:9")
    with pytest.raises(UserError, match="scenes:9 in .* serves none of the tasks that train"):
        preflight(dataclasses.replace(config, data=data), tmp_path / "w")


def test_what_a_source_leaves_out_is_noted(fresh, tmp_path: Path):
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    for name in "abcdefghijkl":
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    Image.fromarray(image[..., 0].astype(np.uint16)).save(tmp_path / "a_depth.png")
    data = dataclasses.replace(fresh().data, source=f"folder:{tmp_path}")
    notes = preflight(dataclasses.replace(fresh(), data=data), tmp_path / "w")["notes"]
    note = "depth maps and masks left out: 1, for example a_depth.png"
    assert f"folder:{tmp_path}: {note}" in notes


def test_it_counts_on_from_a_stopped_run_and_leaves_it_alone(taught_config, taught: Path):
    before = files(taught)
    longer = dataclasses.replace(taught_config.grpo, steps=4)
    found = preflight(dataclasses.replace(taught_config, grpo=longer), taught)
    assert found["steps_done"] == 110 and list(found["stages"]) == ["grpo"]
    assert found["stages"]["grpo"]["steps_left"] == 4 and found["seconds_left"] is None
    assert found["disk"]["there_bytes"] > 0
    assert files(taught) == before


def test_time_left_is_that_of_the_steps_before(taught_config, taught: Path, monkeypatch):
    monkeypatch.setattr(check_module, "_steps_done", lambda _: 107)
    found = preflight(taught_config, taught)
    seconds = [row["perf/step_seconds"] for row in read_metrics(taught)[-50:]]
    assert found["stages"]["sft"]["steps_left"] == 3
    assert found["seconds_left"] == pytest.approx(3 * np.median(seconds), abs=2e-3)


def test_adapters_train_little_and_need_no_reference(fresh, tmp_path: Path):
    whole = preflight(fresh(sft=c.SftSettings()), tmp_path / "w")["stages"]["grpo"]
    settings = fresh().grpo
    lora = dataclasses.replace(settings, lora=LoraSettings(2))
    small = preflight(fresh(sft=c.SftSettings(), grpo=lora), tmp_path / "w")["stages"]["grpo"]
    assert 0 < small["trained"] < whole["trained"] / 5 and whole["frozen"] == 0
    memory = whole["memory_bytes_a_device"]
    assert memory["weights"] == memory["reference"] == 4 * whole["trained"]
    assert memory["optimizer"] == pytest.approx(8 * whole["trained"], rel=1e-3)
    assert small["memory_bytes_a_device"]["reference"] == 0
    text, rows = (
        2 * 2 * 2 * 8 * 4,
        8 * (192 + 3 * 32),
    )  # layers, heads of 8, float32; one batch_prompts
    assert memory["caches"] == text * rows
    more = dataclasses.replace(fresh().eval, samples=4)
    evaluated = preflight(fresh(sft=c.SftSettings(), eval=more), tmp_path / "w")["stages"]["grpo"]
    caches = evaluated["memory_bytes_a_device"]["caches"]
    assert caches == text * 8 * (192 + 5 * 32)  # four samples and a greedy one
    largest = whole["prompts"] * (32 * (1176 + 12) + 64 * 20)  # patches and tokens, of crop's
    assert largest / 10 < whole["batch_bytes"] < largest
    stays = memory["weights"] + memory["optimizer"] + memory["reference"]
    assert stays < memory["sum"] < sum(memory.values()) - memory["sum"]


def test_what_does_not_fit_is_a_problem(fresh, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(check_module, "device_memory_bytes", lambda: 1000)
    usage = type("Usage", (), {"free": 2000})
    monkeypatch.setattr(check_module.shutil, "disk_usage", lambda _: usage)
    *device, disk = preflight(fresh(), tmp_path / "w")["problems"]
    assert [p.split()[0] for p in device] == ["sft", "grpo"] and "1 kB" in device[0]
    assert "only 2 kB is free" in disk and "checkpoint.keep" in disk


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"source": "folder:/nowhere"}, ["folder:/nowhere", "no such folder"]),
        ({"prompt_buckets": (10,)}, ["prompt of", "data.prompt_buckets"]),
        ({"patch_buckets": (0,)}, ["prompt of", "data.prompt_buckets"]),
    ],
)
def test_a_broken_source_or_bucket_is_named(fresh, tmp_path: Path, sections, words):
    config = fresh()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **sections))
    with pytest.raises(UserError) as error:
        preflight(config, tmp_path / "w")
    assert all(word in str(error.value) for word in words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_rows_too_small_for_the_largest_group_are_named(fresh, tmp_path: Path, stage: str):
    config = fresh()
    one = dict(row_tokens=(200,), row_patches=(320,), row_responses=(96,))
    settings = dataclasses.replace(getattr(config, stage), **one)
    with pytest.raises(
        UserError, match=rf"{stage}\.row_tokens, .* of 200, 320, 96, which does not"
    ):
        preflight(dataclasses.replace(config, **{stage: settings}), tmp_path / "w")


def test_as_many_updates_as_prompts_are_checked(fresh, tmp_path: Path):
    """A few prompts of one update are taken, whatever the number of updates."""
    config = fresh()
    grpo = dataclasses.replace(config.grpo, prompts=8, minibatches_per_rollout=8)
    found = preflight(dataclasses.replace(config, grpo=grpo), tmp_path / "w")
    assert found["stages"]["grpo"]["measured_prompts"] == 1


def test_a_folder_of_another_run_is_named(taught_config, taught: Path):
    before = files(taught)
    with pytest.raises(UserError, match="another config .*seed changed"):
        preflight(dataclasses.replace(taught_config, seed=7), taught)
    assert files(taught) == before


def test_weights_that_are_not_there_are_missed_before_they_are_read(fresh, tmp_path: Path):
    config = fresh()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path="tiny"))
    drawn = dataclasses.replace(config.model, from_scratch=False)
    with pytest.raises(UserError, match="holds no .*safetensors"):
        preflight(dataclasses.replace(config, model=drawn), tmp_path / "w")


def test_a_model_whose_rollouts_would_not_end_is_named(fresh, toy_folder: Path, tmp_path: Path):
    config, folder = fresh(), tmp_path / "model"
    shutil.copytree(toy_folder, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    taught, other = settings["eos_token_id"]
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": other}))
    model = dataclasses.replace(config.model, path=str(folder))
    with pytest.raises(
        UserError, match=rf"generation_config.json ends .*\[{other}\], but {taught}"
    ):
        preflight(dataclasses.replace(config, model=model), tmp_path / "w")


def test_the_command_prints_a_list_or_one_object(tmp_path: Path, fresh, capsys, monkeypatch):
    monkeypatch.setattr("spatial_ssrl_jax.config.load.load_config", lambda *_: fresh())
    argv = ["--config=x.py", f"--workdir={tmp_path / 'w'}", "--check"]
    command.main(argv)
    listed = capsys.readouterr().out
    command.main([*argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert "the run can start" in listed and "an estimate" in listed
    assert f"{found['stages']['grpo']['trained']:,} trained" in listed
    with pytest.raises(UserError, match="--json belongs to --check"):
        command.main(["--config=x.py", "--json"])
    monkeypatch.setattr(check_module, "device_memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match="sft needs"):
        command.main(argv)
    assert list(tmp_path.iterdir()) == []
