"""The members of the Qwen-VL family, and what a member brings of its own.

A new member is a file like `qwen2_5.py` and an entry of `MEMBERS`; layers, attention kernels,
adapters and the reading of weights are shared.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl import qwen2_5
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import Grid, WindowLayout
from spatial_ssrl_jax.qwen_vl.layers import Init


@dataclass(frozen=True)
class Member:
    """One model of the family: all in which it differs from the others.

    Attributes:
      config_from_dict: builds the config from a parsed `config.json`; the name is used in errors.
      config_to_dict: the Hub's `config.json` of a config, for weights of a dtype such as `bfloat16`.
      vision_tower: makes the vision tower.
      hub_names: our path of each weight or module -> its name on the Hub, `{}` for the layer.
      window_count: windows that the images of a prompt fill.
      lay_out_windows: where the processor's patches go.
      mrope_positions: [3, T] int32 positions of a prompt's tokens.
    """

    config_from_dict: Callable[[dict[str, Any], str], QwenVLConfig]
    config_to_dict: Callable[[QwenVLConfig, str], dict[str, Any]]
    vision_tower: Callable[[Init, Any], nnx.Module]
    hub_names: Mapping[str, str]
    window_count: Callable[[Any, Sequence[Grid]], int]
    lay_out_windows: Callable[[Any, Sequence[Grid]], WindowLayout]
    mrope_positions: Callable[[Any, np.ndarray, Sequence[Grid], Sequence[float | None]], np.ndarray]


MEMBERS = {
    qwen2_5.MODEL_TYPE: Member(
        config_from_dict=qwen2_5.config_from_dict,
        config_to_dict=qwen2_5.config_to_dict,
        vision_tower=qwen2_5.VisionTower,
        hub_names=qwen2_5.HUB_NAMES,
        window_count=qwen2_5.window_count,
        lay_out_windows=qwen2_5.lay_out_windows,
        mrope_positions=qwen2_5.mrope_positions,
    )
}


def member_of(config: QwenVLConfig) -> Member:
    """The member that a config describes."""
    return MEMBERS[config.model_type]


def read_config(folder: Path) -> QwenVLConfig:
    """Reads `config.json` in the Hub's flat style or the newer nested one.

    Raises:
      UserError: the file is missing, is not JSON, or describes a model outside the family.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: --model needs a Qwen2.5-VL folder as the Hub lays it out."
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    return config_from_dict(raw, str(path))


def config_from_dict(raw: Any, name: str) -> QwenVLConfig:
    """Builds the config from the parsed `config.json`; `name` is used in errors.

    Raises:
      UserError: it describes a model outside the family, or lacks a value.
    """
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in MEMBERS:
        known = " or ".join(map(repr, MEMBERS))
        raise UserError(
            f"{name} describes a {kind!r} model; expected {known}, so give another folder."
        )
    return MEMBERS[kind].config_from_dict(raw, name)


def config_to_dict(config: QwenVLConfig, dtype: str) -> dict[str, Any]:
    """The Hub's `config.json`, as Transformers and vLLM read it; `dtype` like `bfloat16`."""
    return member_of(config).config_to_dict(config, dtype)
