"""Which `adapter_config.json` is plain LoRA, and what it says of each module."""

import json
from pathlib import Path
from typing import Any

import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.peft_settings import AdapterSettings, read_settings

LAYER = "model.language_model.layers.{}.self_attn.{}_proj"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def write(folder: Path, text: str) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(text)
    return path


def read(folder: Path, **settings: Any) -> AdapterSettings:
    return read_settings(write(folder, json.dumps(PLAIN | settings)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("target_parameters", ["q_proj.weight"]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("megatron_config", {"hidden_size": 8}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "a later one"),
        ("peft_type", "IA3"),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("a_later_form_of_lora", 0.5),
        ("a_later_form_of_lora", 0),
    ],
)
def test_what_is_not_known_to_be_plain_lora_is_named(tmp_path: Path, key: str, value: Any):
    with pytest.raises(UserError, match=f"sets {key} to .*, but only plain LoRA"):
        read(tmp_path, **{key: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "layer_replication": []},
        {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "inference_mode": True, "revision": "main"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"], "peft_version": "0.19.0"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "megatron_core": "megatron.core"},
        {"init_lora_weights": True, "corda_config": {"verbose": True}},  # converted to plain LoRA
        *({"init_lora_weights": x} for x in (False, None, "gaussian", "orthogonal", "mica")),
        {"rank_pattern": None, "alpha_pattern": None, "use_rslora": None, "layers_pattern": None},
        {"a_later_form_of_lora": False},
    ],
)
def test_settings_that_leave_the_merged_weights_alone_are_accepted(tmp_path: Path, settings: dict):
    assert read(tmp_path, **settings) == AdapterSettings(r=4, lora_alpha=8)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("r", "many", "must be a whole number"),
        ("r", True, "must be a whole number"),
        ("r", 4.0, "must be a whole number"),
        ("r", None, "must be a whole number"),
        ("r", 0, "must be at least 1"),
        ("lora_alpha", "8", "must be a number"),
        ("lora_alpha", [8], "must be a number"),
        ("lora_alpha", float("nan"), "must be at least"),
        ("lora_alpha", 10**400, "must be at least"),
        ("use_rslora", "yes", "must be true or false"),
        ("use_rslora", {"on": True}, "must be true or false"),
        ("rank_pattern", [4], "must be a dict"),
        ("rank_pattern", {"q_proj": 2.5}, "must be a whole number"),
        ("alpha_pattern", {"q_proj": None}, "must be a number"),
        ("alpha_pattern", {"(": 2}, "is not a regular expression"),
        ("rank_pattern", {"([a-z_]+)+X": 8}, "repeats a group"),
        ("layers_to_transform", [0, "1"], "must be a whole number"),
        ("layers_to_transform", {"0": 1}, "must be a whole number"),
        ("layers_pattern", ["layers", 3], "must be text"),
        ("layers_pattern", "(?P<layer>a)", "is not a regular expression"),
    ],
)
def test_a_value_of_another_type_or_range_is_named(
    tmp_path: Path, key: str, value: Any, problem: str
):
    with pytest.raises(UserError, match=f"adapter_config.json: .*{problem}"):
        read(tmp_path, **{key: value})


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "[" * 100_000])
def test_a_file_that_holds_no_settings_is_named(tmp_path: Path, text: str):
    with pytest.raises(
        UserError, match=r"adapter_config.json (is (not|empty)|holds no JSON object)"
    ):
        read_settings(write(tmp_path, text))


def test_rank_and_scale_are_those_of_the_first_pattern_that_ends_the_name(tmp_path: Path):
    ranks = {r"layers\.1\..*q_proj": 2, "q_proj": 16, "^model.language_model": 5, "proj_q": 6}
    alphas = {"k_proj": 3, LAYER.format(0, "k"): 99}
    settings = read(tmp_path, rank_pattern=ranks, alpha_pattern=alphas)
    found = {(i, x): settings.rank(LAYER.format(i, x)) for i in (0, 1) for x in "qk"}
    assert found == {(0, "q"): 16, (1, "q"): 2, (0, "k"): 4, (1, "k"): 4}
    assert [settings.scale(LAYER.format(0, x)) for x in "qk"] == [8 / 16, 3 / 4]
    settings = read(tmp_path, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=True)
    assert [settings.scale(LAYER.format(0, x)) for x in "qk"] == [8 / 4, 3 / 2]


@pytest.mark.parametrize(
    ("settings", "covered"),
    [
        ({}, {"text 0", "text 12", "block 0", "merger"}),
        ({"layers_to_transform": []}, {"text 0", "text 12", "block 0", "merger"}),
        ({"layers_to_transform": 0}, {"text 0", "block 0"}),
        ({"layers_to_transform": 0, "layers_pattern": ""}, {"text 0", "block 0"}),
        ({"layers_to_transform": [12, 2]}, {"text 12"}),
        ({"layers_to_transform": [0, 12], "layers_pattern": "layers"}, {"text 0", "text 12"}),
        ({"layers_to_transform": [0], "layers_pattern": ["h", "blocks"]}, {"block 0"}),
        ({"layers_to_transform": [0], "layers_pattern": "model.layers"}, set()),
    ],
)
def test_layers_to_transform_as_peft_understands_it(tmp_path: Path, settings: dict, covered: set):
    found = read(tmp_path, **settings)
    modules = {
        "text 0": LAYER.format(0, "q"),
        "text 12": LAYER.format(12, "q"),
        "block 0": "model.visual.blocks.0.attn.qkv",
        "merger": "model.visual.merger.mlp.0",
    }
    assert {label for label, name in modules.items() if found.covers(name)} == covered
