"""Adapters in the layout of Hugging Face's PEFT: `adapter_config.json` and its safetensors.

Modules are named as Transformers 4.52 and later name them (`model.language_model.layers.…`): PEFT
loads an adapter under the Hub's older names without an error, and without its weights. Both are
read.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import FETCH
from spatial_ssrl_jax.common.paths import check_regular
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.lora import TARGETS, LoraSettings, adapter_settings
from spatial_ssrl_jax.qwen_vl.model import abstract_params
from spatial_ssrl_jax.qwen_vl.param_tree import Params, flatten_params, unflatten_params
from spatial_ssrl_jax.qwen_vl.peft_settings import AdapterSettings, read_settings
from spatial_ssrl_jax.qwen_vl.weights import DTYPES, Entry, canonical_name, entries, newer_name

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_HALVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
_EVERY = LoraSettings(1, targets=tuple(TARGETS))


def write_adapter(folder: Path, config: QwenVLConfig, adapters: Params, base: str | None) -> None:
    """Writes adapters, in their own dtype, into an existing folder.

    Args:
      folder: where both files go.
      config: the model's shape.
      adapters: `lora_a`, `lora_b` and `lora_scale` of every layer that has one; all of one rank and
        one scale.
      base: the model they belong to, as `base_model_name_or_path`, or None.
    """
    lora = adapter_settings(adapters)
    flat = jax.device_get(flatten_params(adapters))
    tensors, patterns = {}, []
    for module, entry in _modules(config, lora):
        hub = newer_name(config, entry.name.removesuffix(".weight"))
        patterns.append(re.escape(hub).replace(r"\{\}", r"\d+"))
        for half, kind in _HALVES.items():
            stack = flat[f"{module}/{half}"]
            for i, array in enumerate(stack if entry.layers else [stack]):
                rows = (-1, lora.rank) if half == "lora_a" else (lora.rank, -1)
                tensors[f"{_PREFIX}{hub.format(i)}.{kind}"] = np.ascontiguousarray(
                    array.reshape(rows).T
                )
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

    All have the largest rank in the file: the others are filled up with zeros, as are the layers
    that `layers_to_transform` leaves out.

    Returns:
      The tree of `lora_a`, `lora_b` and `lora_scale` of every layer that has one.

    Raises:
      UserError: a file is missing or broken, the adapter is not plain LoRA, or it does not fit.
    """
    folder = Path(folder)
    settings = read_settings(folder / ADAPTER_CONFIG_FILE)
    tensors = _read_tensors(folder)
    # One spelling for all: what is in the other one is left over.
    newer = any(canonical_name(config, name) != name for name in tensors)
    found: dict[str, list[_Layer | None]] = {}
    for module, entry in _modules(config, _EVERY):
        names = [name.removesuffix(".weight") for name in entry.hub_names]
        names = [newer_name(config, name) if newer else name for name in names]
        if any(f"{name}.{kind}" in tensors for name in names for kind in _HALVES.values()):
            found[module] = [
                _take_layer(folder, settings, tensors, name, entry.hub_shape) for name in names
            ]
    if tensors:
        raise UserError(
            f"{folder} holds {min(tensors)}, which is no adapter of a language, vision or merger "
            "layer that this base and its own settings have: give the base it was trained on, or "
            "merge it with PEFT."
        )
    return _stacked(config, found)


@dataclass(frozen=True)
class _Layer:
    """The adapter of one layer, as the file has it.

    Attributes:
      a: [rank, in].
      b: [out, rank].
      scale: factor of their product.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float


def _stacked(config: QwenVLConfig, found: dict[str, list[_Layer | None]]) -> Params:
    """The tree, from the layers of every adapted module."""
    rank = max(len(x.a) for layers in found.values() for x in layers if x)
    shapes = flatten_params(abstract_params(config, dataclasses.replace(_EVERY, rank=rank)))
    flat: dict[str, np.ndarray] = {}
    for module, layers in found.items():
        present = [x for x in layers if x]
        a = np.zeros((len(layers), present[0].a.shape[1], rank), _dtype(x.a for x in present))
        b = np.zeros((len(layers), rank, len(present[0].b)), _dtype(x.b for x in present))
        scale = np.zeros(len(layers), np.float32)
        for i, layer in enumerate(layers):
            if layer:
                a[i, :, : len(layer.a)], b[i, : len(layer.a)] = layer.a.T, layer.b.T
                scale[i] = layer.scale
        for name, array in (("lora_a", a), ("lora_b", b), ("lora_scale", scale)):
            flat[f"{module}/{name}"] = array.reshape(shapes[f"{module}/{name}"].shape)
    return unflatten_params(flat)


def _dtype(arrays: Iterable[np.ndarray]) -> np.dtype:
    """The dtype of all, or float32."""
    found = {x.dtype for x in arrays}
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


def _modules(config: QwenVLConfig, lora: LoraSettings) -> list[tuple[str, Entry]]:
    """Our path of each adapted layer, and its kernel's entry."""
    adapted = flatten_params(abstract_params(config, lora))
    return [
        (e.path.removesuffix("/kernel"), e)
        for e in entries(config)
        if e.path.replace("/kernel", "/lora_a") in adapted and e.path.endswith("/kernel")
    ]


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor by its name in the file, without PEFT's prefix."""
    path = folder / ADAPTER_FILE
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise UserError(
            f"{folder / _PICKLE} is a pickle, which is not opened: load the adapter with PEFT, and "
            "write it with save_pretrained(FOLDER, safe_serialization=True)."
        )
    tensors = {}
    check_regular(path, FETCH)
    try:
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise UserError(
                        f"{path}: {name} holds {dtype} numbers, which are not read: save the "
                        "adapter again with PEFT as float32 or bfloat16."
                    )
                tensors[name.removeprefix(_PREFIX)] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again.") from None
    if not tensors:
        raise UserError(f"{path} holds no tensors: fetch it again, or save it again with PEFT.")
    return tensors


def _take_layer(
    folder: Path,
    settings: AdapterSettings,
    tensors: dict[str, np.ndarray],
    module: str,
    shape: tuple[int, ...],
) -> _Layer | None:
    """Removes a layer's matrices from those that are left; None where no layer is wanted.

    Args:
      module: the layer's name in the file.
      shape: of the layer's own matrix, [out, in].
    """
    if not settings.covers(module):
        return None
    (out, wide), rank = shape, settings.rank(module)
    a = _take(folder, tensors, f"{module}.lora_A.weight", (rank, wide))
    b = _take(folder, tensors, f"{module}.lora_B.weight", (out, rank))
    return _Layer(a, b, settings.scale(module))


def _take(
    folder: Path, tensors: dict[str, np.ndarray], name: str, shape: tuple[int, int]
) -> np.ndarray:
    """Removes one tensor from those that are left, and returns it."""
    if name not in tensors:
        raise UserError(
            f"{folder} lacks the tensor {name}: fetch it again, or merge it with PEFT if only some "
            "layers are adapted."
        )
    tensor = tensors.pop(name)
    if tensor.shape != shape:
        raise UserError(
            f"{folder}: {name} has shape {tensor.shape}, but {shape} fits its base and its rank: "
            "give the base it was trained on."
        )
    if not np.isfinite(tensor).all():
        raise UserError(
            f"{folder}: {name} holds NaN or infinite values: give an adapter of an earlier step."
        )
    return tensor
