"""The one table between our parameters and the Hub's tensors, read in both directions.

A hub matrix is [out, in]; ours is [*in, *out], so a matrix is transposed and reshaped, and
everything else is reshaped only. Our layers are stacked along a leading axis, the Hub's are
tensors of their own.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.family import member_of
from spatial_ssrl_jax.qwen_vl.model import Params, abstract_params

_AS_IS = ("text/embed", "text/head")
_RENAMED = (("model.language_model.", "model."), ("model.visual.", "visual."))


@dataclass(frozen=True)
class Entry:
    """One of our parameters.

    Attributes:
      path: where it is in the tree, joined by `/`.
      name: the Hub's name, with `{}` for the layer.
      shape: our shape, with the layer axis in front where `layers` is set.
      layers: how many hub tensors are stacked in it, or None.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    layers: int | None

    @property
    def hub_names(self) -> list[str]:
        return [self.name.format(i) for i in range(self.layers)] if self.layers else [self.name]

    def hub_shape(self, config: QwenVLConfig) -> tuple[int, ...]:
        """The shape the Hub keeps one of its tensors in."""
        shape = self.shape[1:] if self.layers else self.shape
        if self.path == "vision/patch_embed/kernel":
            v = config.vision
            return (shape[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
        if not self._is_matrix:
            return (int(np.prod(shape)),) if self.path not in _AS_IS else shape
        contract = 2 if self.path.endswith(("blocks/proj/kernel", "layers/o/kernel")) else 1
        return int(np.prod(shape[contract:])), int(np.prod(shape[:contract]))

    @property
    def _is_matrix(self) -> bool:
        return self.path.endswith("/kernel")

    def from_hub(self, tensor: np.ndarray) -> np.ndarray:
        """One hub tensor in our shape (without the layer axis)."""
        if self._is_matrix:
            tensor = tensor.reshape(tensor.shape[0], -1).T
        return tensor.reshape(self.shape[1:] if self.layers else self.shape)

    def to_hub(self, array: np.ndarray, config: QwenVLConfig) -> np.ndarray:
        """One of our arrays (without the layer axis) in the Hub's shape."""
        shape = self.hub_shape(config)
        if self._is_matrix:
            array = array.reshape(-1, shape[0]).T
        return np.ascontiguousarray(array.reshape(shape))


def entries(config: QwenVLConfig) -> list[Entry]:
    """Every parameter with its hub name, in the tree's order."""
    flat = traverse_util.flatten_dict(abstract_params(config), sep="/")
    hub_names, found = member_of(config).hub_names, []
    for path, leaf in flat.items():
        if path in hub_names:
            name = hub_names[path]
        else:
            module, kind = path.rsplit("/", 1)
            name = f"{hub_names[module]}.{'weight' if kind == 'kernel' else kind}"
        layers = leaf.shape[0] if "{}" in name else None
        found.append(Entry(path, name, leaf.shape, layers))
    return found


def read_params(
    folder: Path,
    config: QwenVLConfig,
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> Params:
    """Reads a folder's safetensors, one parameter at a time.

    Args:
      folder: a hub-like folder; single file or shards, either naming style.
      config: the model's shape.
      place: puts one parameter, given by path and host array in the file's dtype, where it
        belongs; by default it goes to the default device as it is.

    Returns:
      The parameter tree.

    Raises:
      UserError: a missing, extra or wrongly shaped tensor, or a broken file.
    """
    place = place or (lambda path, array: jax.numpy.asarray(array))
    stored = find_tensors(Path(folder), config)
    flat = {entry.path: place(entry.path, _read(entry, stored)) for entry in entries(config)}
    return traverse_util.unflatten_dict(flat, sep="/")


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: its file, its name there, and its shape."""

    path: Path
    name: str
    shape: tuple[int, ...]


def _read(entry: Entry, stored: dict[str, Stored]) -> np.ndarray:
    """One parameter on the host.

    Its files are opened for it alone: what was read of a mapped file stays in memory until it is
    closed, and with all of them open the whole model would be there twice.
    """
    places = [stored[name] for name in entry.hub_names]
    with ExitStack() as stack:
        files = {p: stack.enter_context(safe_open(p, "np")) for p in {x.path for x in places}}
        return _stack((entry.from_hub(files[x.path].get_tensor(x.name)) for x in places), entry)


def _stack(parts: Iterator[np.ndarray], entry: Entry) -> np.ndarray:
    if entry.layers is None:
        return next(parts)
    whole = None
    for i, part in enumerate(parts):
        if whole is None:
            whole = np.empty(entry.shape, part.dtype)
        whole[i] = part
    return whole


def canonical_name(name: str) -> str:
    """The hub's name of a tensor or module that newer exports name otherwise."""
    for new, old in _RENAMED:
        if name.startswith(new):
            return old + name[len(new) :]
    return name


def newer_name(name: str) -> str:
    """The name that Transformers 4.52 and later give what the Hub calls `name`."""
    for new, old in _RENAMED:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def find_tensors(folder: Path, config: QwenVLConfig) -> dict[str, Stored]:
    """Where the tensor of each canonical name is, from the files' headers alone.

    Raises:
      UserError: a missing, extra or wrongly shaped tensor, or a broken file.
    """
    found = {}
    for path in _files(folder):
        try:
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    shape = tuple(file.get_slice(name).get_shape())
                    found[canonical_name(name)] = Stored(path, name, shape)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}): fetch it again.") from None
    _check(folder, config, found)
    return found


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise UserError(f"{index} cannot be read ({error!r}): fetch it again.") from None
        files = [folder / name for name in shards]
    if not files:
        raise UserError(f"{folder} holds no *.safetensors file: fetch the model's weights first.")
    return files


def _check(folder: Path, config: QwenVLConfig, stored: dict[str, Stored]) -> None:
    expected = {n: entry.hub_shape(config) for entry in entries(config) for n in entry.hub_names}
    missing = sorted(expected.keys() - stored.keys())
    extra = sorted(stored.keys() - expected.keys())
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
    extra = [name for name in extra if not re.search(r"rotary_emb\.inv_freq$", name)]
    for what, names in (("lacks", missing), ("also holds", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{folder} {what} the tensor {names[0]}{more}: it does not fit its config.json."
            )
    for name, shape in expected.items():
        found = stored[name].shape
        if found != shape:
            raise UserError(
                f"{folder}: {name} has shape {found}, but config.json asks for {shape}."
            )


def write_params(
    folder: Path, config: QwenVLConfig, params: Params, dtype: str, shard_bytes: int = 4 << 30
) -> None:
    """Writes hub-named safetensors shards with an index into an existing folder.

    Args:
      folder: where the files go.
      config: the model's shape.
      params: the parameter tree, any floating dtype.
      dtype: what to write, `float32` or `bfloat16`.
      shard_bytes: bytes after which a new shard begins.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    shards, sizes, names = [{}], [0], {}
    for entry in entries(config):
        array = np.asarray(jax.device_get(flat[entry.path].astype(dtype)))
        for i, name in enumerate(entry.hub_names):
            tensor = entry.to_hub(array[i] if entry.layers else array, config)
            if sizes[-1] and sizes[-1] + tensor.nbytes > shard_bytes:
                _write_shard(folder, len(shards), shards[-1])
                shards.append({})
                sizes.append(0)
            shards[-1][name] = tensor
            sizes[-1] += tensor.nbytes
            names[name] = len(shards)
    _write_shard(folder, len(shards), shards[-1])
    if len(shards) == 1:
        (folder / _shard_name(1)).rename(folder / "model.safetensors")
        return
    final = {
        i: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    }
    for i, name in final.items():
        (folder / _shard_name(i)).rename(folder / name)
    index = {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {name: final[i] for name, i in names.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.partial"


def _write_shard(folder: Path, number: int, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / _shard_name(number), metadata={"format": "pt"})
    tensors.clear()
