"""Every setting of a run: the sections, loading a config file, and overriding it."""

from spatial_ssrl_jax.config.load import load_config, split_overrides, to_dict
from spatial_ssrl_jax.config.released import released_tasks
from spatial_ssrl_jax.config.schema import (
    CheckpointSettings,
    CompileSettings,
    Config,
    DataSettings,
    EvalSettings,
    GrpoSettings,
    LogSettings,
    MeshSettings,
    ModelSettings,
    OptimSettings,
    RewardSettings,
    RolloutSettings,
    SftSettings,
)
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings

__all__ = [
    "CheckpointSettings",
    "CompileSettings",
    "Config",
    "DataSettings",
    "EvalSettings",
    "GrpoSettings",
    "LogSettings",
    "LoraSettings",
    "MeshSettings",
    "ModelSettings",
    "OptimSettings",
    "RewardSettings",
    "RolloutSettings",
    "SftSettings",
    "load_config",
    "released_tasks",
    "split_overrides",
    "to_dict",
]
