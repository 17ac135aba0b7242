"""Opening a model, wherever it lies, and writing it out as a Hugging Face folder."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from spatial_ssrl_jax.data.prompts import PROCESSOR_FILES
from spatial_ssrl_jax.errors import UserError
from spatial_ssrl_jax.qwen2_5_vl.config import Qwen2_5_VLConfig, config_to_dict, read_config
from spatial_ssrl_jax.qwen2_5_vl.model import Params, abstract_params, init_params
from spatial_ssrl_jax.qwen2_5_vl.weights import read_params, write_params
from spatial_ssrl_jax.run.checkpoint import MODEL, PARAMS, load_params
from spatial_ssrl_jax.run.mesh import Layout

TINY = Path(__file__).parent.parent / "assets" / "tiny"


@dataclass(frozen=True)
class ModelFolder:
    """A model that can be loaded.

    Attributes:
      config: its shape.
      files: folder with its config, tokenizer and processor files.
      weights: folder with its weights, safetensors or Orbax.
    """

    config: Qwen2_5_VLConfig
    files: Path
    weights: Path

    def load(self, layout: Layout, dtype: str | None = None) -> Params:
        """Reads the weights straight into the training layout.

        Args:
          layout: where each weight goes.
          dtype: what to keep them in; None keeps what the files hold.
        """
        shardings = layout.params(self.config)
        if (self.weights / PARAMS).is_dir():
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s),
                abstract_params(self.config),
                shardings,
            )
            return load_params(self.weights / PARAMS, like, keep_dtype=dtype is None)
        flat = traverse_util.flatten_dict(shardings, sep="/")

        def place(path: str, array: np.ndarray) -> jax.Array:
            if dtype is not None and array.dtype != dtype:
                array = array.astype(dtype)
            return jax.make_array_from_callback(array.shape, flat[path], lambda index: array[index])

        return read_params(self.weights, self.config, place)

    def draw(self, layout: Layout, seed: int) -> Params:
        """Fresh weights of this shape, float32, in the training layout."""
        shardings = layout.params(self.config)
        program = jax.jit(init_params, static_argnums=0, out_shardings=shardings)
        return program(self.config, jax.random.key(seed))


def open_model(path: str) -> ModelFolder:
    """Opens a model's description without reading its weights.

    Args:
      path: a Hugging Face folder, a folder that `convert to-orbax` wrote, a step of a run's
        `checkpoints/`, `tiny`, or a hub id (fetched where there is a network).

    Raises:
      UserError: nothing usable lies there.
    """
    if path == "tiny":
        return ModelFolder(read_config(TINY), TINY, TINY)
    folder = Path(path)
    if not folder.is_dir():
        folder = _from_hub(path)
    beside = folder.parent / MODEL
    files = beside if (folder / PARAMS).is_dir() and (beside / "config.json").is_file() else folder
    return ModelFolder(read_config(files), files, folder)


def _from_hub(path: str) -> Path:
    missing = f"the model folder {path} does not exist"
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"{missing}: give a Hugging Face folder, a checkpoint of ours, or a hub id."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path))
    except Exception as error:
        raise UserError(
            f"{missing}, and fetching it from the hub failed ({type(error).__name__}): "
            "check the name and the network."
        ) from error


def copy_files(source: ModelFolder, folder: Path) -> None:
    """Copies tokenizer, template, processor and generation settings."""
    for name in PROCESSOR_FILES:
        if (source.files / name).is_file():
            shutil.copyfile(source.files / name, folder / name)


def write_config(config: Qwen2_5_VLConfig, folder: Path, dtype: str) -> None:
    """Writes the hub's `config.json`."""
    (folder / "config.json").write_text(json.dumps(config_to_dict(config, dtype), indent=2) + "\n")


def export(source: ModelFolder, params: Params, folder: Path, dtype: str) -> None:
    """Writes a Hugging Face folder that Transformers and vLLM load; whole or not at all.

    Args:
      source: gives the config and the processor's files.
      params: the weights.
      folder: must not exist; it appears when it is complete.
      dtype: `float32` or `bfloat16`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        copy_files(source, partial)
        write_config(source.config, partial, dtype)
        write_params(partial, source.config, params, dtype)
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def claim_folder(folder: Path, overwrite: bool, *inputs: Path) -> None:
    """Makes sure that `folder` may be written: absent, empty, or `--overwrite` was given.

    Args:
      folder: what will be written.
      overwrite: what it holds may go.
      inputs: what is read; never removed.

    Raises:
      UserError: it holds something, or one of the inputs.
    """
    for path in inputs:
        if path.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{folder} holds what is read ({path}): choose another folder to write."
            )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise UserError(f"{folder} is not empty: choose another folder or give --overwrite.")
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    elif folder.is_dir():
        folder.rmdir()
