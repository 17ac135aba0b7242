"""Opening a model, wherever it lies, and writing it out as a Hugging Face folder."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from spatial_ssrl_jax.data.prompts import PROCESSOR_FILES
from spatial_ssrl_jax.errors import UserError
from spatial_ssrl_jax.folders import fetched, folder_at, in_bucket, whole_folder
from spatial_ssrl_jax.qwen2_5_vl.config import Qwen2_5_VLConfig, config_to_dict, read_config
from spatial_ssrl_jax.qwen2_5_vl.lora import (
    LoraSettings,
    found_adapters,
    merge_adapters,
    only_adapters,
)
from spatial_ssrl_jax.qwen2_5_vl.model import Params, abstract_params, init_adapters, init_params
from spatial_ssrl_jax.qwen2_5_vl.peft import write_adapter
from spatial_ssrl_jax.qwen2_5_vl.tree import join, select
from spatial_ssrl_jax.qwen2_5_vl.weights import find_tensors, read_params, write_params
from spatial_ssrl_jax.run.checkpoint import (
    MODEL,
    PARAMS,
    load_params,
    stored_params,
    weight_folders,
)
from spatial_ssrl_jax.run.checksums import fingerprint
from spatial_ssrl_jax.run.mesh import Layout, gather_whole, is_writer

TINY = Path(__file__).parent.parent / "assets" / "tiny"


@dataclass(frozen=True)
class ModelFolder:
    """A model that can be loaded.

    Attributes:
      config: its shape.
      files: folder with its config, tokenizer and processor files.
      weights: folder with its weights, safetensors or Orbax; an Orbax one may lie in a bucket.
      name: what it was asked for by.
    """

    config: Qwen2_5_VLConfig
    files: Path
    weights: epath.Path
    name: str

    def load(self, layout: Layout, dtype: str | None = None) -> Params:
        """Reads the weights straight into the training layout.

        Args:
          layout: where each weight goes.
          dtype: what to keep them in; None keeps what the files hold.
        """
        if (self.weights / PARAMS).is_dir():
            return self._load_orbax(layout, dtype)
        shardings = layout.params(self.config)
        flat = traverse_util.flatten_dict(shardings, sep="/")

        def place(path: str, array: np.ndarray) -> jax.Array:
            if dtype is not None and array.dtype != dtype:
                array = array.astype(dtype)
            return jax.make_array_from_callback(array.shape, flat[path], lambda index: array[index])

        return read_params(self.weights, self.config, place)

    def _load_orbax(self, layout: Layout, dtype: str | None) -> Params:
        """A step's trained and frozen weights come together, adapters merged, in `dtype`."""
        trained, *frozen = weight_folders(self.weights)
        if not frozen:
            like = layout.abstract(self.config)
            if dtype is not None:
                like = jax.tree.map(lambda x: x.update(dtype=dtype), like)
            return load_params(trained, like, keep_dtype=dtype is None)
        params = load_split(trained, frozen[0], self.config, layout)
        return merge_adapters(params, dtype or "float32")

    def check_weights(self) -> None:
        """Refuses weights that are not a model of this shape, by their files' headers alone.

        Raises:
          UserError: they are missing, broken or of another shape.
        """
        if not (self.weights / PARAMS).is_dir():
            find_tensors(self.weights, self.config)
            return
        stored: Params = {}
        for folder in weight_folders(self.weights):
            stored = join(stored, stored_params(folder))
        whole = abstract_params(self.config, found_adapters(stored))
        shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (stored, whole)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"the weights in {self.weights} are not of the shape that "
                f"{self.files / 'config.json'} asks for: copy both again."
            )

    def fingerprint(self) -> str:
        """Tells these weights from others, wherever they lie."""
        if not (self.weights / PARAMS).is_dir():
            return fingerprint({p.name: p for p in self.weights.glob("*.safetensors")})
        folders = [Path(folder) for folder in weight_folders(self.weights)]
        files = [(folder, p) for folder in folders for p in folder.rglob("*") if p.is_file()]
        return fingerprint({f"{d.name}/{p.relative_to(d)}": p for d, p in files})

    def draw(self, layout: Layout, seed: int) -> Params:
        """Fresh weights of this shape, float32, in the training layout."""
        shardings = layout.params(self.config)
        program = jax.jit(init_params, static_argnums=0, out_shardings=shardings)
        return program(self.config, jax.random.key(seed))

    def draw_adapters(self, layout: Layout, lora: LoraSettings, seed: int) -> Params:
        """Fresh adapters alone, float32, in the training layout."""
        shardings = only_adapters(layout.params(self.config, lora))
        program = jax.jit(init_adapters, static_argnums=(0, 1), out_shardings=shardings)
        return program(self.config, lora, jax.random.key(seed))


def load_split(
    trained: epath.Path, frozen: epath.Path, config: Qwen2_5_VLConfig, layout: Layout
) -> Params:
    """Reads the weights that trained and those that did not, in their own dtypes, as one tree.

    Raises:
      UserError: together they are not a model of this shape.
    """
    stored = [stored_params(folder) for folder in (trained, frozen)]
    whole = layout.abstract(config, found_adapters(join(*stored)))
    loaded = {}
    for folder, tree in zip((trained, frozen), stored, strict=True):
        paths = traverse_util.flatten_dict(tree, sep="/")
        loaded = join(loaded, load_params(folder, select(whole, paths.__contains__), True))
    if jax.tree.structure(loaded) != jax.tree.structure(whole):
        raise UserError(f"{trained} and {frozen} are together no whole model: copy both again.")
    return loaded


def open_model(path: epath.PathLike) -> ModelFolder:
    """Opens a model's description without reading its weights.

    Args:
      path: a Hugging Face folder, a folder that `convert to-orbax` wrote, a step of a run's
        `checkpoints/`, `tiny`, or a hub id (fetched where there is a network). All but the last two
        may lie in a bucket: a Hugging Face folder is copied from there, Orbax reads in place.

    Raises:
      UserError: nothing usable lies there.
    """
    if path == "tiny":
        return ModelFolder(read_config(TINY), TINY, epath.Path(TINY), path)
    folder, files = _find(str(path))
    files = fetched(files)
    weights = folder if (folder / PARAMS).is_dir() else epath.Path(files)
    return ModelFolder(read_config(files), files, weights, str(path))


def read_shape(path: str) -> Qwen2_5_VLConfig:
    """A model's shape from its `config.json` alone; of a hub id nothing else is fetched.

    Raises:
      UserError: nothing usable lies there.
    """
    if path == "tiny":
        return read_config(TINY)
    _, files = _find(path, ["config.json"])
    return read_config(fetched(files, "config.json"))


def _find(path: str, allow_patterns: list[str] | None = None) -> tuple[epath.Path, epath.Path]:
    """The folder of a model's weights and the one of its other files."""
    folder = folder_at(path)
    if in_bucket(folder):
        if not folder.exists():
            raise UserError(f"the model folder {path} does not exist: check bucket and name.")
    elif not folder.is_dir():
        folder = epath.Path(_from_hub(path, allow_patterns))
    beside = folder.parent / MODEL
    is_step = (folder / PARAMS).is_dir() and (beside / "config.json").is_file()
    return folder, beside if is_step else folder


def _from_hub(path: str, allow_patterns: list[str] | None = None) -> Path:
    missing = f"the model folder {path} does not exist"
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"{missing}: give a Hugging Face folder, a checkpoint of ours, or a hub id."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=allow_patterns))
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


def export(source: ModelFolder, params: Params, folder: epath.PathLike, dtype: str) -> None:
    """Writes a Hugging Face folder that Transformers and vLLM load; whole or not at all.

    Args:
      source: gives the config and the processor's files.
      params: the weights.
      folder: it appears, or is replaced, when it is complete.
      dtype: `float32` or `bfloat16`.

    Every process calls it, and one writes: it holds the whole model in host memory then.
    """
    if jax.process_count() > 1:
        params = jax.tree.map(lambda x: gather_whole(x.astype(dtype)), params)
    if not is_writer():
        return
    with whole_folder(folder) as partial:
        copy_files(source, partial)
        write_config(source.config, partial, dtype)
        write_params(partial, source.config, params, dtype)


def export_adapter(
    step: ModelFolder, layout: Layout, folder: epath.PathLike, base: str | None
) -> None:
    """Writes the adapters of a LoRA stage's checkpoint as PEFT has them; whole or not at all.

    Args:
      step: the checkpoint.
      layout: where its weights are read to.
      folder: it appears, or is replaced, when it is complete.
      base: the model they belong to; None when it was drawn and lies nowhere.
    """
    params = load_split(*weight_folders(step.weights), step.config, layout)
    adapters = jax.tree.map(gather_whole, only_adapters(params))
    if not is_writer():
        return
    with whole_folder(folder) as partial:
        write_adapter(partial, step.config, adapters, base)
