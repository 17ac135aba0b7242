"""A short run of both stages with LoRA: merged weights go from stage to stage, and it resumes."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from spatial_ssrl_jax import convert
from spatial_ssrl_jax.config import CheckpointSettings, Config, MeshSettings, load_config
from spatial_ssrl_jax.errors import UserError
from spatial_ssrl_jax.learn import grpo
from spatial_ssrl_jax.learn.reward import Reward
from spatial_ssrl_jax.qwen2_5_vl.lora import LoraSettings, without_adapters
from spatial_ssrl_jax.run import models
from spatial_ssrl_jax.run.checkpoint import weight_folders
from spatial_ssrl_jax.run.mesh import Layout, make_mesh
from spatial_ssrl_jax.run.start import Start, check_start
from spatial_ssrl_jax.run.training import train
from tests.conftest import ROOT, random_params


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow model of one layer with the tiny one's tokenizer."""
    tiny = models.open_model("tiny")
    text = dataclasses.replace(
        tiny.config.text, hidden_size=32, intermediate_size=32, num_hidden_layers=1
    )
    text = dataclasses.replace(text, num_attention_heads=2, num_key_value_heads=1)
    text = dataclasses.replace(text, mrope_section=(2, 3, 3))
    vision = dataclasses.replace(
        tiny.config.vision, depth=1, hidden_size=16, intermediate_size=16, num_heads=1
    )
    vision = dataclasses.replace(vision, out_hidden_size=32, fullatt_block_indexes=(0,))
    config = dataclasses.replace(tiny.config, text=text, vision=vision)
    folder = tmp_path_factory.mktemp("base") / "hf"
    source = dataclasses.replace(tiny, config=config)
    models.export(source, random_params(config, seed=1), folder, "float32")
    return folder


@pytest.fixture(scope="module")
def config(base: Path) -> Config:
    """Two steps a stage, two prompts a step, no held-out figures."""
    tiny = load_config(str(ROOT / "configs" / "tiny.py"))
    small = {"steps": 2, "prompts": 2, "learning_rate": 0.05}
    groups = {"micro_prompts": 2, "group": 2, "warmup": 0.0}
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, path=str(base), from_scratch=False),
        data=dataclasses.replace(tiny.data, source="scenes:20", heldout_share=0.0),
        sft=dataclasses.replace(tiny.sft, **small, micro_rows=1, lora=LoraSettings(2)),
        grpo=dataclasses.replace(tiny.grpo, **small, **groups, lora=LoraSettings(3)),
        rollout=dataclasses.replace(tiny.rollout, wave=2),
        checkpoint=CheckpointSettings(every=1, keep=9),
    )


@pytest.fixture(scope="module", autouse=True)
def some_reward() -> Iterator[None]:
    """Answers of an untrained model earn nothing: here long ones do, so that GRPO learns."""

    def by_length(text: str, *_) -> Reward:
        return Reward(overall=len(text) / 100, accuracy=0.0, format=0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "score", by_length)
        yield


@pytest.fixture(scope="module")
def done(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    assert train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout(make_mesh(MeshSettings()))


def at(workdir: Path, step: int, layout: Layout):
    """The whole model at a step, adapters merged."""
    return models.open_model(str(workdir / "checkpoints" / str(step))).load(layout, "float32")


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def moved(before, after) -> bool:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs) > 1e-3


def metrics(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    clock = ("perf/", "memory/", "time")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def test_the_cold_starts_merged_weights_are_grpos_base_and_reference(
    config: Config, base: Path, done: Path, layout: Layout
):
    start = models.open_model(str(base)).load(layout)
    handed = at(done, 2, layout)
    assert moved(start["text"], handed["text"]) and bits(start["vision"]) == bits(handed["vision"])
    last = done / "checkpoints" / "4"
    beside = models.load_split(*weight_folders(last), models.open_model(str(base)).config, layout)
    assert bits(without_adapters(beside)) == bits(handed)
    rows = {row["step"]: row for row in metrics(done)}
    assert abs(rows[3]["kl/mean"]) < 1e-6 < rows[4]["kl/mean"]
    assert moved(handed["text"], at(done, 4, layout)["text"])


def test_steps_hold_adapters_alone(done: Path):
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    steps = done / "checkpoints"
    assert size(steps / "4" / "params") < size(steps / "frozen_grpo") / 2
    assert not {"vision", "embed"} & {p.name for p in (steps / "4" / "params").rglob("*")}


def test_the_export_is_the_merged_model_and_the_adapter_leads_to_it(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    export = load_file(done / "export" / "model.safetensors")
    handed = str(done / "checkpoints" / "2")
    settings = json.loads((done / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == handed and settings["r"] == 3
    convert.main(["merge-lora", handed, str(done / "adapter"), str(tmp_path / "m")])
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert merged.keys() == export.keys()
    assert all(merged[name].tobytes() == export[name].tobytes() for name in merged)


def test_a_run_that_stopped_goes_on_bit_for_bit(
    config: Config, done: Path, tmp_path: Path, layout: Layout
):
    again = tmp_path / "w"
    shutil.copytree(done, again)
    for left in ("checkpoints/4", "export", "adapter", "summary.json"):
        path = again / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(config, again)
    assert metrics(again) == metrics(done)
    assert bits(at(again, 4, layout)) == bits(at(done, 4, layout))
    names = ("export/model.safetensors", "adapter/adapter_model.safetensors")
    assert all((again / name).read_bytes() == (done / name).read_bytes() for name in names)


def starting(config: Config, layout: Layout, **changes) -> Start:
    """What a run of GRPO alone starts from."""
    config = dataclasses.replace(
        config,
        sft=dataclasses.replace(config.sft, steps=0),
        grpo=dataclasses.replace(config.grpo, **changes),
    )
    model = models.open_model(config.model.path)
    return Start(config, model, layout, SimpleNamespace(), lambda _: None)


def test_grpo_starts_from_elsewhere(config: Config, base: Path, done: Path, layout: Layout):
    places = {"": base, **{str(p): p for p in (done / "checkpoints" / "2", done / "export")}}
    for path, place in places.items():
        start = starting(config, layout, init_from=path)
        check_start(start.config, start.model)
        wanted = models.open_model(str(place)).load(layout, "float32")
        assert bits(start.params(start.config.grpo)) == bits(wanted)
    whole = starting(config, layout, init_from=str(base), lora=LoraSettings())
    assert start.base(start.config.grpo).weights == done / "export"
    assert whole.params(whole.config.grpo)["text"]["embed"].dtype == np.float32


def test_another_model_to_start_from_is_refused(config: Config, base: Path, layout: Layout):
    tiny = dataclasses.replace(config, model=dataclasses.replace(config.model, path="tiny"))
    start = starting(tiny, layout, init_from=str(base))
    with pytest.raises(UserError, match=r"grpo\.init_from=.*hf is another model than .*path=tiny"):
        check_start(start.config, start.model)
    start = starting(config, layout, init_from="/nowhere/m")
    with pytest.raises(UserError, match="model folder /nowhere/m does not exist"):
        check_start(start.config, start.model)
