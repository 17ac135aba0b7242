"""Writing a model as a Hugging Face folder, and adapters as a PEFT folder."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from spatial_ssrl_jax.checkpoint.models import ModelFolder, load_split
from spatial_ssrl_jax.checkpoint.params import weight_folders
from spatial_ssrl_jax.common.json_file import read_object
from spatial_ssrl_jax.common.outputs import atomic_folder
from spatial_ssrl_jax.data.processor import PROCESSOR_FILES
from spatial_ssrl_jax.parallel.collectives import gather_to_host, is_primary
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.family import config_to_dict, read_processor
from spatial_ssrl_jax.qwen_vl.lora import select_adapters
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.qwen_vl.peft import write_adapter
from spatial_ssrl_jax.qwen_vl.weights import write_params

_IMAGES, _VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"


def copy_files(source: ModelFolder, folder: Path) -> None:
    """Copies tokenizer, template, processor and generation settings, as Transformers 4.49 to 5 read
    them.

    Transformers 5 keeps both processors in `processor_config.json`, at which earlier versions fail,
    and an image's area in `size`, where they take their own limits; and it lists special tokens
    under a name that is an object's in them.
    """
    for name in PROCESSOR_FILES:
        if (source.files / name).is_file() and name != "processor_config.json":
            shutil.copyfile(source.files / name, folder / name)
    for settings, name in (
        (read_processor(source.files, "image"), _IMAGES),
        (read_processor(source.files, "video"), _VIDEOS),
    ):
        after, file = _with_area(settings.values), Path(settings.name).name
        changed = file == name and after != settings.values
        if changed or file == "processor_config.json":
            _write_settings(folder / name, after)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists():
        before = read_object(tokenizer).values
        if (after := _with_listed_tokens(before)) != before:
            _write_settings(tokenizer, after)


def _write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _with_area(settings: Mapping[str, Any]) -> dict[str, Any]:
    """An image processor's settings with its limits under their earlier names too."""
    size = settings.get("size") or {}
    limits = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    lacking = {k: v for k, v in limits.items() if v is not None and settings.get(k) is None}
    return {**settings, **lacking}


def _with_listed_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's settings with a list of special tokens under its earlier name."""
    listed = settings.get("extra_special_tokens")
    if not isinstance(listed, list):
        return dict(settings)
    kept = {k: v for k, v in settings.items() if k != "extra_special_tokens"}
    return {"additional_special_tokens": listed} | kept


def write_generation_config(
    config: QwenVLConfig, stop_ids: Sequence[int], folder: Path, temperature: float
) -> None:
    """Writes a `generation_config.json` with which servers sample as training does.

    The Hub's own has a repetition penalty, and an absent `top_k` is 50 in Transformers.

    Args:
      config: the model's.
      stop_ids: tokens that end a response.
      folder: an existing one.
      temperature: of sampling.
    """
    settings = {
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.bos_token_id,
        "eos_token_id": list(stop_ids),
        "do_sample": True,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": config.text.vocab_size,
        "repetition_penalty": 1.0,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main_dtype(params: Params) -> str:
    """The dtype that most of the weights have."""
    counts: Counter[str] = Counter()
    for leaf in jax.tree.leaves(params):
        counts[str(leaf.dtype)] += leaf.size
    return counts.most_common(1)[0][0]


def write_config(config: QwenVLConfig, folder: Path, dtype: str) -> None:
    """Writes the Hub's `config.json`."""
    (folder / "config.json").write_text(json.dumps(config_to_dict(config, dtype), indent=2) + "\n")


def export(
    source: ModelFolder,
    params: Params,
    folder: epath.PathLike,
    dtype: str | None,
    overwrite: bool | None = None,
) -> None:
    """Writes a Hugging Face folder that Transformers and vLLM load; atomically.

    Every process calls it. The primary one writes, with the whole model in its host memory.

    Args:
      source: the model whose config and processor files are written.
      params: the weights.
      folder: the output; replaced once the new one is complete.
      dtype: `float32` or `bfloat16`; None keeps each weight's own.
      overwrite: whether other content of the folder may be removed; None updates the files of an
        earlier export, and leaves all others.
    """
    if jax.process_count() > 1:
        params = jax.tree.map(lambda x: gather_to_host(x.astype(dtype or x.dtype)), params)
    if not is_primary():
        return
    replaces = _of_an_export if overwrite is None else None
    with atomic_folder(folder, bool(overwrite), source.inputs, replaces) as partial:
        copy_files(source, partial)
        write_config(source.config, partial, dtype or main_dtype(params))
        write_params(partial, source.config, params, dtype)


def _of_an_export(name: str) -> bool:
    """Whether a file's name is one that an export has."""
    weights = name.endswith((".safetensors", ".safetensors.index.json"))
    return weights or name in ("config.json", "adapter_config.json", *PROCESSOR_FILES)


def export_adapter(
    step: ModelFolder, layout: Layout, folder: epath.PathLike, base: str | None
) -> None:
    """Writes the adapters of a LoRA stage's checkpoint in PEFT's format; atomically.

    Args:
      step: the checkpoint.
      layout: for reading its weights.
      folder: the output; replaced once the new one is complete.
      base: the model that the adapters belong to; None when it was trained from scratch.
    """
    trained, frozen = weight_folders(step.weights)
    params = load_split(trained, frozen, step.config, layout)
    adapters = jax.tree.map(gather_to_host, select_adapters(params))
    if not is_primary():
        return
    with atomic_folder(folder, replaces=_of_an_export) as partial:
        write_adapter(partial, step.config, adapters, base)
