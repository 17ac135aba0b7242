"""Writing a model as a Hugging Face folder, and adapters as a PEFT folder."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
from etils import epath

from spatial_ssrl_jax.checkpoint.models import ModelFolder, load_split
from spatial_ssrl_jax.checkpoint.params import weight_folders
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


def copy_files(source: ModelFolder, folder: Path) -> None:
    """Copies tokenizer, template, processor and generation settings.

    What Transformers 5 keeps in `processor_config.json` alone is written as earlier versions read
    it, too.
    """
    for name in PROCESSOR_FILES:
        if (source.files / name).is_file():
            shutil.copyfile(source.files / name, folder / name)
    settings = read_processor(source.files, "image").values
    target = folder / "preprocessor_config.json"
    if settings and not target.exists():
        target.write_text(json.dumps(settings, indent=2) + "\n")


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
