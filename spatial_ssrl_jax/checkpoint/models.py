"""Opening a model: a Hugging Face folder, a hub id, a checkpoint, here or in a bucket."""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from spatial_ssrl_jax.checkpoint.manager import MODEL
from spatial_ssrl_jax.checkpoint.params import PARAMS, load_params, stored_params, weight_folders
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.fingerprint import fingerprint, hash_texts
from spatial_ssrl_jax.common.paths import in_bucket, list_tree, local_copy, user_path
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.family import read_config
from spatial_ssrl_jax.qwen_vl.lora import (
    LoraSettings,
    adapter_settings,
    merge_adapters,
    select_adapters,
)
from spatial_ssrl_jax.qwen_vl.model import Params, abstract_params, init_adapters, init_params
from spatial_ssrl_jax.qwen_vl.param_tree import flatten_params, merge_params, select_params
from spatial_ssrl_jax.qwen_vl.weights import entries, find_tensors, has_own_head, read_params

TINY = Path(__file__).parent.parent / "assets" / "tiny"


@dataclass(frozen=True)
class ModelFolder:
    """A model that can be loaded.

    Attributes:
      config: the model's shape.
      files: folder with its config, tokenizer and processor files.
      weights: folder with its weights, safetensors or Orbax; Orbax weights may be in a bucket.
      name: the path or hub id that it was opened by.
    """

    config: QwenVLConfig
    files: Path
    weights: epath.Path
    name: str

    def load(self, layout: Layout, dtype: str | None = None) -> Params:
        """Reads the weights directly into their shards.

        Args:
          layout: the sharding of each weight.
          dtype: of the result; None keeps the dtypes of the files.

        Raises:
          UserError: a tensor is missing, of another shape or dtype, or not finite.
        """
        is_orbax = (self.weights / PARAMS).is_dir()
        params = self._load_orbax(layout, dtype) if is_orbax else self._load_hub(layout, dtype)
        self._check_finite(params, layout)
        return params

    def _load_hub(self, layout: Layout, dtype: str | None) -> Params:
        """Reads safetensors."""
        shardings = layout.param_shardings(self.config)
        flat = flatten_params(shardings)

        def place(path: str, array: np.ndarray) -> jax.Array:
            if dtype is not None and array.dtype != dtype:
                array = array.astype(dtype)
            return jax.make_array_from_callback(array.shape, flat[path], lambda index: array[index])

        return read_params(Path(self.weights), self.config, place)

    def _load_orbax(self, layout: Layout, dtype: str | None) -> Params:
        """Reads Orbax weights; trained and frozen ones as one tree, adapters merged, in `dtype`."""
        trained, *frozen = weight_folders(self.weights)
        if not frozen:
            like = layout.abstract_params(self.config)
            if dtype is not None:
                like = jax.tree.map(lambda x: x.update(dtype=dtype), like)
            return load_params(trained, like, keep_dtype=dtype is None)
        params = load_split(trained, frozen[0], self.config, layout)
        return merge_adapters(params, dtype or "float32")

    def _check_finite(self, params: Params, layout: Layout) -> None:
        """Raises `UserError` with the name of the first tensor that is not finite."""
        replicated = NamedSharding(layout.mesh, PartitionSpec())
        program = jax.jit(_is_finite, out_shardings=replicated)  # one by one: it needs memory
        flat = flatten_params(params)
        for entry in entries(self.config):
            ok = np.asarray(program(flat[entry.path]))
            if not ok.all():
                name = entry.hub_names[int(ok.argmin()) if entry.layers else 0]
                raise UserError(
                    f"{self.name}: the tensor {name} holds NaN or infinite values: fetch the "
                    "weights again, or give a model or checkpoint from before they appeared."
                )

    @property
    def inputs(self) -> tuple[epath.PathLike, ...]:
        """Files and folders that are read."""
        place = user_path(self.name) if in_bucket(self.name) else self.weights
        shards = [] if in_bucket(self.weights) else self.weights.glob("*.safetensors")
        return (self.files, self.weights, place, *map(os.path.realpath, shards))

    def check_weights(self) -> None:
        """Checks, by the files' headers alone, that the weights are a model of this shape.

        Raises:
          UserError: they are missing, damaged or of another shape.
        """
        if not (self.weights / PARAMS).is_dir():
            find_tensors(Path(self.weights), self.config)
            return
        stored: Params = {}
        for folder in weight_folders(self.weights):
            stored = merge_params(stored, stored_params(folder))
        whole = abstract_params(self.config, adapter_settings(stored))
        shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (stored, whole)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"the weights in {self.weights} do not have the shape that "
                f"{self.files / 'config.json'} declares: copy both again."
            )

    def fingerprint(self) -> str:
        """A hash of the weights; a local copy of them has the same."""
        if not (self.weights / PARAMS).is_dir():
            return fingerprint({p.name: p for p in self.weights.glob("*.safetensors")})
        if in_bucket(self.weights):
            trees = [(f.name, list_tree(f)) for f in weight_folders(self.weights)]
            return hash_texts(f"{d}/{k} {v}" for d, tree in trees for k, v in sorted(tree.items()))
        folders = [Path(folder) for folder in weight_folders(self.weights)]
        files = [(folder, p) for folder in folders for p in folder.rglob("*") if p.is_file()]
        return fingerprint({f"{d.name}/{p.relative_to(d)}": p for d, p in files})

    def init(self, layout: Layout, seed: int) -> Params:
        """Random weights of this shape, float32, in the training layout."""
        shardings = layout.param_shardings(self.config)
        program = jax.jit(init_params, static_argnums=0, out_shardings=shardings)
        return program(self.config, jax.random.key(seed))

    def init_adapters(self, layout: Layout, lora: LoraSettings, seed: int) -> Params:
        """Fresh adapters without the base, float32, in the training layout."""
        shardings = select_adapters(layout.param_shardings(self.config, lora))
        program = jax.jit(init_adapters, static_argnums=(0, 1), out_shardings=shardings)
        return program(self.config, lora, jax.random.key(seed))


def _is_finite(weight: jax.Array) -> jax.Array:
    """For each row of a weight, as layers are stacked in it, whether all values are finite."""
    return jnp.isfinite(weight).all(axis=tuple(range(1, weight.ndim)))


def load_split(
    trained: epath.Path, frozen: epath.Path, config: QwenVLConfig, layout: Layout
) -> Params:
    """Reads trained and frozen weights, in their own dtypes, as one tree.

    Raises:
      UserError: together they are not a model of this shape.
    """
    stored = [stored_params(folder) for folder in (trained, frozen)]
    whole = layout.abstract_params(config, adapter_settings(merge_params(*stored)))
    loaded = {}
    for folder, tree in zip((trained, frozen), stored, strict=True):
        paths = flatten_params(tree)
        loaded = merge_params(
            loaded, load_params(folder, select_params(whole, paths.__contains__), True)
        )
    if jax.tree.structure(loaded) != jax.tree.structure(whole):
        raise UserError(
            f"{trained} and {frozen} are together not a complete model: copy both again."
        )
    return loaded


def open_model(path: epath.PathLike) -> ModelFolder:
    """Opens a model's description without reading its weights.

    Args:
      path: a Hugging Face folder, a folder that `convert to-orbax` wrote, a step of a run's
        `checkpoints/`, `tiny`, or a hub id (downloaded if it is not cached). All but the last two
        may be in a bucket: a Hugging Face folder is copied from there, Orbax reads in place. A head
        that differs from the embedding is kept, though the folder's config ties the two.

    Raises:
      UserError: nothing usable is there.
    """
    if path == "tiny":
        return ModelFolder(read_config(TINY), TINY, epath.Path(TINY), "tiny")
    folder, files = _find(str(path))
    files = local_copy(files)
    config = read_config(files)
    if (folder / PARAMS).is_dir():
        return ModelFolder(config, files, folder, str(path))
    with suppress(UserError):  # of weights that are missing or damaged, raised when they are read
        if has_own_head(files, config):
            config = replace(config, tie_word_embeddings=False)
    return ModelFolder(config, files, epath.Path(files), str(path))


def read_shape(path: str) -> QwenVLConfig:
    """A model's shape from its `config.json` alone; of a hub id only that file is downloaded.

    Raises:
      UserError: nothing usable is there.
    """
    if path == "tiny":
        return read_config(TINY)
    _, files = _find(path, ["config.json"])
    return read_config(local_copy(files, "config.json"))


def _find(path: str, allow_patterns: list[str] | None = None) -> tuple[epath.Path, epath.Path]:
    """The folder of a model's weights, and the folder of its other files."""
    folder = user_path(path)
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
            f"{missing}: give a Hugging Face folder, a checkpoint of a run, or a hub id."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=allow_patterns))
    except Exception as error:
        raise UserError(
            f"{missing}, and its download from the Hub failed ({type(error).__name__}): "
            "check the name and the network."
        ) from error
