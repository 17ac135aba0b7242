"""The members of the Qwen-VL family, and in what they differ.

A new member is a file like `qwen2_5.py` and an entry of `MEMBERS`; the language model, attention
kernels, adapters and the reading of weights are shared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from jax import Array

from spatial_ssrl_jax.common.bounds import Bounds
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import JsonObject, read_json, read_object
from spatial_ssrl_jax.common.text import shown
from spatial_ssrl_jax.qwen_vl import qwen2_5
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import PIXEL_KEYS, QwenVLConfig, VisionConfig
from spatial_ssrl_jax.qwen_vl.inputs import Grid, PatchLayout, VisionInput
from spatial_ssrl_jax.qwen_vl.layers import Init

Vision = TypeVar("Vision", bound=VisionConfig)


class VisionEncoder(Protocol):
    """A vision tower: its blocks, [B, M, C] of each merged token, and its merger, which makes one
    vector of the text model's width of each."""

    def encode(self, vision: VisionInput[Array], compute: Compute) -> Array: ...

    def merge(self, x_BMC: Array, compute: Compute) -> Array: ...


@dataclass(frozen=True)
class Member(Generic[Vision]):
    """One model of the family: all in which it differs from the others.

    Attributes:
      config_from_dict: builds the config from a parsed `config.json`; the name is used in errors.
      config_to_dict: the Hub's `config.json` of a config and of weights in a dtype like `bfloat16`.
      vision_tower: makes the vision tower.
      hub_names: our path of each weight or module -> its name on the Hub, `{}` for the layer.
      hub_shapes: our path -> shape on the Hub, of kernels that are not [out, in] there.
      renamed: prefixes of names that newer exports give, and what the Hub has instead.
      lay_out_patches: the order of a prompt's patches.
      mrope_positions: [3, T] int32 positions of a prompt's tokens.
    """

    config_from_dict: Callable[[dict[str, Any], str], QwenVLConfig]
    config_to_dict: Callable[[QwenVLConfig, str], dict[str, Any]]
    vision_tower: Callable[[Init, Vision], VisionEncoder]
    hub_names: Mapping[str, str]
    hub_shapes: Callable[[Vision], Mapping[str, tuple[int, ...]]]
    renamed: tuple[tuple[str, str], ...]
    lay_out_patches: Callable[[Vision, Sequence[Grid]], PatchLayout]
    mrope_positions: Callable[
        [Vision, np.ndarray, Sequence[Grid], Sequence[float | None]], np.ndarray
    ]


MEMBERS: dict[str, Member[Any]] = {
    qwen2_5.MODEL_TYPE: Member(
        config_from_dict=qwen2_5.config_from_dict,
        config_to_dict=qwen2_5.config_to_dict,
        vision_tower=qwen2_5.VisionTower,
        hub_names=qwen2_5.HUB_NAMES,
        hub_shapes=qwen2_5.hub_shapes,
        renamed=qwen2_5.RENAMED,
        lay_out_patches=qwen2_5.lay_out_patches,
        mrope_positions=qwen2_5.mrope_positions,
    )
}


def _without_config(folder: Path) -> str:
    """What a folder without `config.json` is, and what to do."""
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} is an adapter, not a model: merge it into its base with convert merge-lora "
            "BASE ADAPTER OUT, and give OUT."
        )
    if any(folder.glob("model_world_size_*_rank_*.pt")):
        return (
            f"{folder} holds a model in verl's FSDP shards: merge them with convert from-fsdp "
            f"{folder} OUT, and give OUT."
        )
    return (
        f"{folder / 'config.json'} is missing: --model needs a folder with the files that a model "
        "has on the Hub."
    )


_PIXELS = {"image_mean": Bounds(), "image_std": Bounds(above=0)}
_PROCESSOR_FILE = {
    "image": "preprocessor_config.json",
    "video": "video_preprocessor_config.json",
}


def member_of(config: QwenVLConfig) -> Member[Any]:
    """The member that a config describes."""
    return MEMBERS[config.model_type]


def read_config(folder: Path) -> QwenVLConfig:
    """Reads `config.json` in the Hub's flat style or the newer nested one.

    Mean and standard deviation of pixels are those of the image processor, if its file exists.

    Raises:
      UserError: the file is missing, is not JSON, or describes a model outside the family.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(_without_config(Path(folder)))
    config = config_from_dict(read_json(path), str(path))
    settings = read_processor(folder, "image")
    given = [name for name in PIXEL_KEYS if settings.values.get(name) is not None]
    found = {n: settings.items(n, float, length=3, bounds=_PIXELS[n]) for n in given}
    return replace(config, vision=replace(config.vision, **found))


def read_processor(folder: Path, kind: Literal["image", "video"]) -> JsonObject:
    """Settings of a folder's image or video processor, with the name of their file.

    Transformers 5 writes both to `processor_config.json`, which comes first there too; earlier
    versions write a file each. A folder without any for videos treats frames like images. The
    settings are empty where the folder has none.

    Raises:
      UserError: a file is damaged.
    """
    kinds = [kind, "image"] if kind == "video" else [kind]
    for part in kinds:
        both = Path(folder) / "processor_config.json"
        if both.is_file() and (found := read_object(both).section(f"{part}_processor")).values:
            return found
        own = Path(folder) / _PROCESSOR_FILE[part]
        if own.is_file():
            return read_object(own)
    return JsonObject({}, str(Path(folder) / _PROCESSOR_FILE["image"]))


def config_from_dict(raw: Any, name: str) -> QwenVLConfig:
    """Builds the config from the parsed `config.json`; `name` is used in errors.

    Raises:
      UserError: it describes a model outside the family, or lacks a value.
    """
    if isinstance(raw, dict) and {"grpo", "rollout"} <= raw.keys():
        raise UserError(
            f"{name} is a run's: give the run's export/, or a step of its checkpoints/."
        )
    if isinstance(raw, dict) and (quantised := raw.get("quantization_config")):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{name} is of a quantised model ({method!s:.60}), whose weights are not read: give "
            "the model that it was made from."
        )
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in MEMBERS:
        known = " or ".join(map(repr, MEMBERS))
        named = "no model_type" if kind is None else f"the model_type {shown(kind)}"
        raise UserError(f"{name} has {named}; expected {known}, so give another folder.")
    return MEMBERS[kind].config_from_dict(raw, name)


def config_to_dict(config: QwenVLConfig, dtype: str) -> dict[str, Any]:
    """The Hub's `config.json`, as Transformers and vLLM read it; `dtype` like `bfloat16`."""
    return member_of(config).config_to_dict(config, dtype)
