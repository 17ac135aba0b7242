"""The PEFT layout: bit-exact there and back, read by peft itself, refused when it does not fit."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spatial_ssrl_jax.checkpoint.export import export
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings, merge_adapters
from spatial_ssrl_jax.qwen_vl.model import init_adapters
from spatial_ssrl_jax.qwen_vl.param_tree import merge_params
from spatial_ssrl_jax.qwen_vl.peft import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    read_adapter,
    write_adapter,
)

LORA = LoraSettings(rank=3, alpha=12.0, targets=("language", "vision.qkv", "merger"))
PREFIX = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


def draw(config, lora: LoraSettings = LORA):
    """Adapters whose every weight is drawn at random."""
    rng = np.random.default_rng(4)
    fresh = init_adapters(config, lora, jax.random.key(0))
    return jax.tree.map(
        lambda x: x if x.ndim < 2 else 0.1 * rng.normal(size=x.shape).astype(np.float32), fresh
    )


@pytest.fixture
def folder(toy, tmp_path: Path) -> Path:
    write_adapter(tmp_path, toy.config, draw(toy.config), "some/base")
    return tmp_path


def edit(folder: Path, **changes) -> None:
    path = folder / ADAPTER_CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename(folder: Path, change) -> None:
    tensors = {change(name): x for name, x in load_file(folder / ADAPTER_FILE).items()}
    save_file({name: x for name, x in tensors.items() if name}, folder / ADAPTER_FILE)


def assert_same(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_bit_exact(toy, tmp_path: Path, dtype: str):
    adapters = jax.tree.map(
        lambda x: x if x.ndim < 2 else jax.numpy.asarray(x, dtype), draw(toy.config)
    )
    write_adapter(tmp_path, toy.config, adapters, "some/base")
    assert_same(read_adapter(tmp_path, toy.config), adapters)


def test_names_and_shapes_are_those_of_peft(toy, folder: Path):
    tensors, adapters = load_file(folder / ADAPTER_FILE), draw(toy.config)
    width = toy.config.text.hidden_size
    assert tensors[f"{PREFIX}.lora_A.weight"].shape == (3, width)
    assert tensors[f"{PREFIX}.lora_B.weight"].shape == (width, 3)
    o = tensors[f"{PREFIX.replace('q_proj', 'o_proj')}.lora_A.weight"]
    np.testing.assert_array_equal(
        o[2], adapters["text"]["layers"]["o"]["lora_a"][0, ..., 2].ravel()
    )
    settings = json.loads((folder / ADAPTER_CONFIG_FILE).read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (3, 12.0, "LORA")
    assert settings["base_model_name_or_path"] == "some/base"


def older(name: str) -> str:
    name = name.replace("model.language_model.", "model.")
    return name.replace("base_model.model.model.visual", "base_model.model.visual")


def test_the_hubs_older_names_are_read_too(toy, folder: Path):
    before = read_adapter(folder, toy.config)
    rename(folder, older)
    assert_same(read_adapter(folder, toy.config), before)
    edit(folder, alpha_pattern={"^model.layers.1.self_attn.q_proj": 24.0})
    scale = read_adapter(folder, toy.config)["text"]["layers"]["q"]["lora_scale"]
    np.testing.assert_array_equal(scale, [4.0, 8.0])


def test_older_and_newer_names_in_one_file_are_refused(toy, folder: Path):
    rename(folder, lambda name: older(name) if "layers.1" in name else name)
    with pytest.raises(UserError, match="lacks the tensor model.language_model.layers.1"):
        read_adapter(folder, toy.config)


def test_rank_stabilised_scale(toy, folder: Path):
    edit(folder, use_rslora=True)
    scale = read_adapter(folder, toy.config)["text"]["layers"]["q"]["lora_scale"]
    np.testing.assert_allclose(scale, 12.0 / 3**0.5, rtol=1e-6)


def test_a_rank_that_is_not_that_of_the_tensors_is_named(toy, folder: Path):
    edit(folder, r=4)
    with pytest.raises(UserError, match=r"k_proj.lora_A.weight has shape \(3, 48\), but \(4, 48\)"):
        read_adapter(folder, toy.config)


def test_a_tensor_that_is_missing_or_of_another_base_is_named(toy, folder: Path):
    other = dataclasses.replace(toy.config.text, intermediate_size=72)
    with pytest.raises(
        UserError, match=r"down_proj.lora_A.weight has shape \(3, 64\), but \(3, 72\)"
    ):
        read_adapter(folder, dataclasses.replace(toy.config, text=other))
    short = dataclasses.replace(toy.config.text, num_hidden_layers=1)
    with pytest.raises(
        UserError, match=r"holds model.language_model.layers.1.*, which is no adapter"
    ):
        read_adapter(folder, dataclasses.replace(toy.config, text=short))
    rename(folder, lambda name: None if name == f"{PREFIX}.lora_B.weight" else name)
    with pytest.raises(UserError, match=r"lacks the tensor \S+layers.0.self_attn.q_proj.lora_B"):
        read_adapter(folder, toy.config)


def test_a_folder_without_an_adapter_and_a_broken_file_are_named(toy, folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        read_adapter(tmp_path / "nowhere", toy.config)
    (folder / ADAPTER_FILE).write_bytes((folder / ADAPTER_FILE).read_bytes()[:100])
    with pytest.raises(UserError, match="adapter_model.safetensors cannot be read"):
        read_adapter(folder, toy.config)


def test_layers_without_an_adapter_are_zero_where_the_settings_leave_them_out(toy, folder: Path):
    whole = read_adapter(folder, toy.config)["text"]["layers"]["q"]
    rename(folder, lambda name: name if "layers.1." in name else None)
    with pytest.raises(UserError, match=r"lacks the tensor \S+layers.0.self_attn.k_proj.lora_A"):
        read_adapter(folder, toy.config)
    edit(folder, layers_to_transform=[1])
    q = read_adapter(folder, toy.config)["text"]["layers"]["q"]
    for half in ("lora_a", "lora_b"):
        np.testing.assert_array_equal(q[half][1], whole[half][1])
        assert not q[half][0].any() and q[half].dtype == whole[half].dtype


def test_adapters_of_layers_that_the_settings_leave_out_are_named(toy, folder: Path):
    edit(folder, layers_to_transform=[0])
    with pytest.raises(UserError, match=r"holds \S+layers.1.\S+, which is no adapter"):
        read_adapter(folder, toy.config)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(toy, folder: Path, value: float):
    tensors = load_file(folder / ADAPTER_FILE)
    tensors[f"{PREFIX}.lora_A.weight"][1, 2] = value
    save_file(tensors, folder / ADAPTER_FILE)
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj.lora_A.weight holds NaN or"):
        read_adapter(folder, toy.config)


def test_floats_of_several_kinds_become_float32_and_other_numbers_are_named(toy, folder: Path):
    tensors = load_file(folder / ADAPTER_FILE)
    name = f"{PREFIX}.lora_A.weight"
    save_file(tensors | {name: tensors[name].astype(np.float16)}, folder / ADAPTER_FILE)
    q = read_adapter(folder, toy.config)["text"]["layers"]["q"]["lora_a"]
    assert q.dtype == np.float32
    np.testing.assert_allclose(q[0].T, tensors[name], rtol=1e-3)
    save_file(tensors | {name: tensors[name].astype(np.int8)}, folder / ADAPTER_FILE)
    with pytest.raises(UserError, match="q_proj.lora_A.weight holds I8 numbers"):
        read_adapter(folder, toy.config)


def test_a_pickle_and_a_file_without_tensors_are_named(toy, folder: Path):
    save_file({}, folder / ADAPTER_FILE)
    with pytest.raises(UserError, match="adapter_model.safetensors holds no tensors"):
        read_adapter(folder, toy.config)
    (folder / ADAPTER_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin is a pickle.*safe_serialization=True"):
        read_adapter(folder, toy.config)


def test_peft_computes_the_same_as_merged_weights(tmp_path: Path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    from transformers import Qwen2_5_VLForConditionalGeneration as Reference

    from tests.conftest import random_params

    tiny = open_model("tiny")
    params, adapters = random_params(tiny.config, seed=1), draw(tiny.config)
    export(tiny, params, tmp_path / "base", "float32")
    merged = merge_adapters(merge_params(params, adapters), "float32")
    export(tiny, merged, tmp_path / "merged", "float32")
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", tiny.config, adapters, str(tmp_path / "base"))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        base = Reference.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        before = base(input_ids=ids).logits
        found = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(input_ids=ids).logits
        whole = Reference.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        wanted = whole(input_ids=ids).logits
    scale = float(wanted.abs().max())
    assert float((before - wanted).abs().max()) > 0.01 * scale
    assert float((found - wanted).abs().max()) < 1e-5 * scale
    unused = [
        name
        for name, weight in base.named_parameters()
        if "lora_B" in name and not weight.abs().sum()
    ]
    assert not unused
