"""A short run of both stages with LoRA: merged weights go from stage to stage, and it resumes."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from spatial_ssrl_jax import convert
from spatial_ssrl_jax.checkpoint.models import load_split, open_model
from spatial_ssrl_jax.checkpoint.params import weight_folders
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config, MeshSettings
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings, drop_adapters
from spatial_ssrl_jax.rl.stages import stages
from spatial_ssrl_jax.trainer.initial_state import StageInitializer, check_initial_weights
from spatial_ssrl_jax.trainer.training import train

pytestmark = pytest.mark.usefixtures("reward_by_length")


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout(make_mesh(MeshSettings()))


def at(workdir: Path, step: int, layout: Layout):
    """The whole model at a step, adapters merged."""
    return open_model(str(workdir / "checkpoints" / str(step))).load(layout, "float32")


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


def test_the_merged_weights_of_sft_are_grpos_base_and_reference(
    lora_config: Config, lora_base: Path, lora_run: Path, layout: Layout
):
    start = open_model(str(lora_base)).load(layout)
    handed = at(lora_run, 2, layout)
    assert moved(start["text"], handed["text"]) and bits(start["vision"]) == bits(handed["vision"])
    last = lora_run / "checkpoints" / "4"
    beside = load_split(*weight_folders(last), open_model(str(lora_base)).config, layout)
    assert bits(drop_adapters(beside)) == bits(handed)
    rows = {row["step"]: row for row in metrics(lora_run)}
    assert abs(rows[3]["kl/mean"]) < 1e-6 < rows[4]["kl/mean"]
    assert moved(handed["text"], at(lora_run, 4, layout)["text"])


def test_steps_hold_adapters_alone(lora_run: Path):
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    steps = lora_run / "checkpoints"
    assert size(steps / "4" / "params") < size(steps / "frozen_grpo") / 2
    assert not {"vision", "embed"} & {p.name for p in (steps / "4" / "params").rglob("*")}


def test_the_export_is_the_merged_model_and_the_adapter_leads_to_it(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    export = load_file(lora_run / "export" / "model.safetensors")
    handed = str(lora_run / "checkpoints" / "2")
    settings = json.loads((lora_run / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == handed and settings["r"] == 3
    convert.main(["merge-lora", handed, str(lora_run / "adapter"), str(tmp_path / "m")])
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert merged.keys() == export.keys()
    assert all(merged[name].tobytes() == export[name].tobytes() for name in merged)


def test_an_interrupted_run_resumes_bit_for_bit(
    lora_config: Config, lora_run: Path, tmp_path: Path, layout: Layout
):
    again = tmp_path / "w"
    shutil.copytree(lora_run, again)
    for left in ("checkpoints/4", "export", "adapter", "summary.json"):
        path = again / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(lora_config, again)
    assert metrics(again) == metrics(lora_run)
    assert bits(at(again, 4, layout)) == bits(at(lora_run, 4, layout))
    names = ("export/model.safetensors", "adapter/adapter_model.safetensors")
    assert all((again / name).read_bytes() == (lora_run / name).read_bytes() for name in names)


def starting(config: Config, layout: Layout, **changes) -> StageInitializer:
    """What a run of GRPO alone starts from."""
    config = dataclasses.replace(
        config,
        sft=dataclasses.replace(config.sft, steps=0),
        grpo=dataclasses.replace(config.grpo, **changes),
    )
    model = open_model(config.model.path)
    return StageInitializer(config, model, layout, SimpleNamespace(), lambda _: None)


def test_grpo_starts_from_elsewhere(
    lora_config: Config, lora_base: Path, lora_run: Path, layout: Layout
):
    places = {
        "": lora_base,
        **{str(p): p for p in (lora_run / "checkpoints" / "2", lora_run / "export")},
    }
    for path, place in places.items():
        start = starting(lora_config, layout, init_from=path)
        check_initial_weights(start.config, start.model)
        wanted = open_model(str(place)).load(layout, "float32")
        assert bits(start.params(*stages(start.config))) == bits(wanted)
    whole = starting(lora_config, layout, init_from=str(lora_base), lora=LoraSettings())
    assert start.base(*stages(start.config)).weights == lora_run / "export"
    assert whole.params(*stages(whole.config))["text"]["embed"].dtype == np.float32


def test_another_model_to_start_from_is_refused(
    lora_config: Config, lora_base: Path, layout: Layout
):
    tiny = dataclasses.replace(
        lora_config, model=dataclasses.replace(lora_config.model, path="tiny")
    )
    start = starting(tiny, layout, init_from=str(lora_base))
    with pytest.raises(UserError, match=r"grpo\.init_from=.*hf is another model than .*path=tiny"):
        check_initial_weights(start.config, start.model)
    start = starting(lora_config, layout, init_from="/nowhere/m")
    with pytest.raises(UserError, match="model folder /nowhere/m does not exist"):
        check_initial_weights(start.config, start.model)


def test_a_damaged_sft_checkpoint_is_no_reference(
    lora_config: Config, lora_run: Path, tmp_path: Path
):
    shutil.copytree(lora_run / "checkpoints", tmp_path / "checkpoints")
    largest = max((tmp_path / "checkpoints/2/params").rglob("*"), key=lambda p: p.stat().st_size)
    data = largest.read_bytes()
    largest.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    checkpoints = SimpleNamespace(folder=tmp_path / "checkpoints", wait=lambda: None)
    model = open_model(lora_config.model.path)
    start = StageInitializer(lora_config, model, None, checkpoints, lambda _: None)
    with pytest.raises(UserError, match="SFT checkpoint .*2 is damaged .*was altered"):
        start.params(stages(lora_config)[1])
