"""Adapters in the layout of Hugging Face's PEFT: `adapter_config.json` and its safetensors.

Modules are named as Transformers 4.52 and later name them (`model.language_model.layers.…`): PEFT
loads an adapter under the Hub's older names without an error, and without its weights. Both are
read.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.lora import TARGETS, LoraSettings, adapter_settings
from spatial_ssrl_jax.qwen_vl.model import abstract_params
from spatial_ssrl_jax.qwen_vl.param_tree import Params, flatten_params, unflatten_params
from spatial_ssrl_jax.qwen_vl.weights import canonical_name, entries, newer_name

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HALVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
# Settings with which an adapter is not x @ A @ B * scale; all must be empty or false.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "fan_in_fan_out",
    "trainable_token_indices",
    "layer_replication",
)


def write_adapter(folder: Path, config: QwenVLConfig, adapters: Params, base: str | None) -> None:
    """Writes adapters, in their own dtype, into an existing folder.

    Args:
      folder: where both files go.
      config: the model's shape.
      adapters: `lora_a`, `lora_b` and `lora_scale` of every layer that has one.
      base: the model they belong to, as `base_model_name_or_path`, or None.
    """
    lora = adapter_settings(adapters)
    flat = jax.device_get(flatten_params(adapters))
    tensors, patterns = {}, []
    for module, hub, layers in _modules(config, lora):
        patterns.append(re.escape(newer_name(config, hub)).replace(r"\{\}", r"\d+"))
        for half, kind in _HALVES.items():
            stack = flat[f"{module}/{half}"]
            for i, array in enumerate(stack if layers else [stack]):
                rows = (-1, lora.rank) if half == "lora_a" else (lora.rank, -1)
                name = f"{_PREFIX}{newer_name(config, hub).format(i)}.{kind}"
                tensors[name] = np.ascontiguousarray(array.reshape(rows).T)
    scale = max(float(np.max(x)) for path, x in flat.items() if path.endswith("/lora_scale"))
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": scale * lora.rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": "|".join(patterns),
        "task_type": "CAUSAL_LM",
    }
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def read_adapter(folder: Path, config: QwenVLConfig) -> Params:
    """Reads adapters, in the file's dtype, for a model of this shape; NumPy arrays.

    Returns:
      The tree of `lora_a`, `lora_b` and `lora_scale` of every layer that has one.

    Raises:
      UserError: a file is missing or broken, the adapter is not plain LoRA, or it does not fit.
    """
    folder = Path(folder)
    rank, scale = _read_settings(folder)
    tensors = _read_tensors(folder, config)
    every = LoraSettings(rank, targets=tuple(TARGETS))
    shapes = flatten_params(abstract_params(config, every))
    flat: dict[str, np.ndarray] = {}
    for module, hub, layers in _modules(config, every):
        names = [hub.format(i) for i in range(layers or 1)]
        if not any(f"{name}.{kind}" in tensors for name in names for kind in _HALVES.values()):
            continue
        for half, kind in _HALVES.items():
            shape = shapes[f"{module}/{half}"].shape
            one = shape[1:] if layers else shape
            wide = math.prod(one) // rank
            wanted = (rank, wide) if half == "lora_a" else (wide, rank)
            arrays = [
                _take(folder, tensors, f"{name}.{kind}", wanted).T.reshape(one) for name in names
            ]
            flat[f"{module}/{half}"] = np.stack(arrays) if layers else arrays[0]
        lead = shapes[f"{module}/lora_scale"].shape
        flat[f"{module}/lora_scale"] = np.full(lead, scale, np.float32)
    if tensors:
        raise UserError(
            f"{folder} adapts {min(tensors)}, which this base does not have: give the base it was "
            "trained on."
        )
    return unflatten_params(flat)


def _modules(config: QwenVLConfig, lora: LoraSettings) -> list[tuple[str, str, int | None]]:
    """Each adapted layer: our path, the Hub's name with `{}` for the layer, and how many layers."""
    adapted = flatten_params(abstract_params(config, lora))
    return [
        (e.path.removesuffix("/kernel"), e.name.removesuffix(".weight"), e.layers)
        for e in entries(config)
        if e.path.replace("/kernel", "/lora_a") in adapted and e.path.endswith("/kernel")
    ]


def _read_settings(folder: Path) -> tuple[int, float]:
    """Rank and scale."""
    path = folder / ADAPTER_CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: give a folder that PEFT or a run wrote.")
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        rank, alpha = int(raw["r"]), float(raw["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): fetch it again.") from None
    more = [key for key in _UNSUPPORTED if raw.get(key)]
    more += ["bias"] if raw.get("bias", "none") != "none" else []
    if raw.get("peft_type") != "LORA" or more or rank < 1:
        problem = f"sets {more[0]}" if more else f"is a {raw.get('peft_type')} adapter, rank {rank}"
        raise UserError(f"{path} {problem}: only plain LoRA is supported; merge it with PEFT.")
    return rank, alpha / (rank**0.5 if raw.get("use_rslora") else rank)


def _read_tensors(folder: Path, config: QwenVLConfig) -> dict[str, np.ndarray]:
    """Every tensor by the Hub's name of its module."""
    path = folder / ADAPTER_FILE
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again.") from None
    return {canonical_name(config, name.removeprefix(_PREFIX)): x for name, x in tensors.items()}


def _take(
    folder: Path, tensors: dict[str, np.ndarray], name: str, shape: tuple[int, int]
) -> np.ndarray:
    """Removes one tensor from those that are left, and returns it."""
    if name not in tensors:
        raise UserError(f"{folder} lacks the tensor {name}: fetch it again.")
    tensor = tensors.pop(name)
    if tensor.shape != shape:
        raise UserError(
            f"{folder}: {name} has shape {tensor.shape}, but {shape} fits its base and its rank: "
            "give the base it was trained on."
        )
    return tensor
