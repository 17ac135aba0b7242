"""Adapters that PEFT itself writes, of all its forms: merged as PEFT merges them, or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.lora import merge_adapters
from spatial_ssrl_jax.qwen_vl.param_tree import merge_params
from spatial_ssrl_jax.qwen_vl.peft import read_adapter
from spatial_ssrl_jax.qwen_vl.weights import canonical_name, write_params
from tests.qwen_vl.conftest import MINI, NO_TORCH, Checkpoint, make_checkpoint

torch = pytest.importorskip("torch", reason=NO_TORCH)
peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj", "qkv", "attn.proj", "mlp.0", "mlp.2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("base"), {**MINI, "tied": False}, seed=1)


def fresh(base: Checkpoint) -> Any:
    return type(base.torch_model).from_pretrained(base.folder, dtype=torch.float32)


def train(base: Checkpoint, settings: Any) -> Any:
    """A model of PEFT whose every trained weight is drawn at random."""
    torch.manual_seed(0)
    model = peft.get_peft_model(fresh(base), settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_merged_as_peft_does(base: Checkpoint, folder: Path, model: Any, work: Path) -> None:
    adapters = jax.tree.map(jnp.asarray, read_adapter(folder, base.config))
    write_params(work, base.config, merge_adapters(merge_params(base.params, adapters), "float32"))
    found, before = (load_file(x / "model.safetensors") for x in (work, base.folder))
    before = {canonical_name(base.config, name): tensor for name, tensor in before.items()}
    merged = model.merge_and_unload().state_dict()
    wanted = {canonical_name(base.config, name): x.numpy() for name, x in merged.items()}
    assert found.keys() == wanted.keys()
    assert max(float(np.abs(found[name] - wanted[name]).max()) for name in found) < 1e-6
    assert max(float(np.abs(found[name] - before[name]).max()) for name in found) > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1),
        dict(target_modules=ALL, exclude_modules=["qkv"], use_rslora=True),
        dict(init_lora_weights="gaussian"),
        dict(init_lora_weights="orthogonal"),
        dict(init_lora_weights="eva"),
        dict(layers_to_transform=[1], target_modules=ALL),
        dict(layers_to_transform=0, layers_pattern="layers", target_modules=ALL),
        dict(layers_to_transform=[1], layers_pattern=["blocks"], target_modules=ALL),
        dict(
            target_modules="all-linear",
            use_rslora=True,
            rank_pattern={"qkv": 3, "mlp.0": 8, r"layers\.1\..*.q_proj": 2},
            alpha_pattern={"mlp.2": 3, "blocks.1.attn.proj": 1, "q_proj": 20},
        ),
    ],
    ids=str,
)
def test_forms_that_are_merged(base: Checkpoint, tmp_path: Path, settings: dict):
    defaults = dict(r=4, lora_alpha=6, target_modules=ATTENTION)
    model = train(base, peft.LoraConfig(**defaults | settings))
    model.save_pretrained(tmp_path / "adapter")
    assert_merged_as_peft_does(base, tmp_path / "adapter", model, tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused_until_peft_converts_it(
    base: Checkpoint, tmp_path: Path, start: str
):
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, init_lora_weights=start)
    untrained = peft.get_peft_model(fresh(base), settings)
    untrained.peft_config["default"].init_lora_weights = True
    untrained.save_pretrained(tmp_path / "start")
    settings.init_lora_weights = start
    model = train(base, settings)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f'sets init_lora_weights to "{start}"'):
        read_adapter(tmp_path / "adapter", base.config)
    converted = tmp_path / "converted"
    initial = str(tmp_path / "start")
    model.save_pretrained(converted, path_initial_model_for_weight_conversion=initial)
    assert_merged_as_peft_does(base, converted, model, tmp_path)


def lora(**settings: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**dict(r=4, target_modules=ATTENTION) | settings)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        (lora(use_dora=True), "sets use_dora"),
        (lora(bias="all"), "sets bias"),
        (lora(lora_bias=True), "sets lora_bias"),
        (lora(modules_to_save=["lm_head"]), "sets modules_to_save"),
        (lora(trainable_token_indices=[1, 2]), "sets trainable_token_indices"),
        (lora(target_parameters=["q_proj.weight"], target_modules=[]), "sets target_parameters"),
        (lora(target_modules=["embed_tokens"]), r"holds \S+embed_tokens\.\S+, which is no adapter"),
        (lora(target_modules=["lm_head"]), r"holds lm_head\.\S+, which is no adapter"),
        (
            lora(target_modules=["proj"]),
            r"holds \S+patch_embed.proj.lora_A\S+, which is no adapter",
        ),
        (lora(target_modules=r".*layers\.1.*q_proj"), "lacks the tensor .* only some layers"),
        (lambda: peft.LoHaConfig(r=4, target_modules=ATTENTION), "sets peft_type to .LOHA"),
        (lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]), "sets peft_type to .VERA"),
        (lambda: peft.AdaLoraConfig(target_modules=ATTENTION, total_step=9), "to .ADALORA"),
        (
            lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
            "sets peft_type to .IA3",
        ),
    ],
)
def test_forms_that_are_refused(
    base: Checkpoint, tmp_path: Path, settings: Callable[[], Any], cause: str
):
    train(base, settings()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=cause):
        read_adapter(tmp_path, base.config)


def test_a_pickle_of_peft_is_refused(base: Checkpoint, tmp_path: Path):
    train(base, lora()()).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UserError, match="adapter_model.bin is a pickle"):
        read_adapter(tmp_path, base.config)
