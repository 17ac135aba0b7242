"""Between our parameters and the Hub's tensors: one table, read in both directions.

A hub matrix is [out, in]; ours is [*in, *out], so a matrix is transposed and reshaped, and
everything else is reshaped only. Our layers are stacked along a leading axis; on the Hub each has
tensors of its own.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import FETCH, JsonObject, read_object
from spatial_ssrl_jax.common.paths import check_regular
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.family import member_of
from spatial_ssrl_jax.qwen_vl.model import abstract_params, contracted_axes
from spatial_ssrl_jax.qwen_vl.param_tree import Params, flatten_params, unflatten_params

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"  # names on the Hub
_TABLES = ("text/embed", "text/head")  # [V, D] here and on the Hub
DTYPES = {  # those of safetensors that weights may have
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}


@dataclass(frozen=True)
class Entry:
    """One of our parameters.

    Attributes:
      path: where it is in the tree, joined by `/`.
      name: the Hub's name, with `{}` for the layer.
      shape: our shape, with the layer axis in front where `layers` is set.
      hub_shape: shape of each of its tensors on the Hub.
      layers: how many hub tensors are stacked in it, or None.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    hub_shape: tuple[int, ...]
    layers: int | None

    @property
    def hub_names(self) -> list[str]:
        """The names of its tensors on the Hub, a layer after another."""
        return [self.name.format(i) for i in range(self.layers)] if self.layers else [self.name]

    @property
    def _is_matrix(self) -> bool:
        return self.path.endswith("/kernel")

    def from_hub(self, tensor: np.ndarray) -> np.ndarray:
        """One hub tensor in our shape (without the layer axis)."""
        if self._is_matrix:
            tensor = tensor.reshape(tensor.shape[0], -1).T
        return tensor.reshape(self.shape[1:] if self.layers else self.shape)

    def to_hub(self, array: np.ndarray) -> np.ndarray:
        """One of our arrays (without the layer axis) in the Hub's shape."""
        if self._is_matrix:
            array = array.reshape(-1, self.hub_shape[0]).T
        return np.ascontiguousarray(array.reshape(self.hub_shape))


def entries(config: QwenVLConfig) -> list[Entry]:
    """Every parameter with its hub name, in the tree's order."""
    member, contracted, found = member_of(config), contracted_axes(config), []
    hub_names, hub_shapes = member.hub_names, member.hub_shapes(config.vision)
    for path, leaf in flatten_params(abstract_params(config)).items():
        module, kind = path.rsplit("/", 1)
        if path in hub_names:
            name = hub_names[path]
        else:
            name = f"{hub_names[module]}.{'weight' if kind == 'kernel' else kind}"
        layers = leaf.shape[0] if "{}" in name else None
        shape = leaf.shape[1:] if layers else leaf.shape
        if path in hub_shapes:
            hub_shape = hub_shapes[path]
        elif kind == "kernel":
            count = contracted[module]
            hub_shape = (math.prod(shape[count:]), math.prod(shape[:count]))
        else:
            hub_shape = shape if path in _TABLES else (math.prod(shape),)
        found.append(Entry(path, name, leaf.shape, hub_shape, layers))
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
      place: puts one parameter, given by path and host array in the file's dtype, on devices; by
        default on the default device.

    Returns:
      The parameter tree.

    Raises:
      UserError: a missing, extra or wrongly shaped tensor, or a broken file.
    """
    place = place or (lambda path, array: jax.numpy.asarray(array))
    stored = find_tensors(Path(folder), config)
    flat = {entry.path: place(entry.path, _read(entry, stored)) for entry in entries(config)}
    return unflatten_params(flat)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: the file, the tensor's name there, its shape and dtype."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def _read(entry: Entry, stored: dict[str, StoredTensor]) -> np.ndarray:
    """One parameter on the host, in the dtype that holds those of all its layers.

    Its files are opened for it alone: the pages read of a mapped file stay in memory until it is
    closed, so with all files open the whole model would be in memory twice.
    """
    tensors = [stored[name] for name in entry.hub_names]
    with ExitStack() as stack:
        files = {p: stack.enter_context(safe_open(p, "np")) for p in {x.path for x in tensors}}
        layers = (entry.from_hub(files[x.path].get_tensor(x.name)) for x in tensors)
        return stack_layers(
            layers, entry, jax.numpy.result_type(*{DTYPES[x.dtype] for x in tensors})
        )


def stack_layers(layers: Iterator[np.ndarray], entry: Entry, dtype: np.dtype) -> np.ndarray:
    """The parameter, of its tensors in our shape, which are taken one by one."""
    first = next(layers)
    if entry.layers is None:
        return first.astype(dtype, copy=False)
    stacked = np.empty(entry.shape, dtype)
    stacked[0] = first
    del first
    for i, layer in enumerate(layers, 1):
        stacked[i] = layer
    return stacked


def canonical_name(config: QwenVLConfig, name: str) -> str:
    """The Hub's name of a tensor or module, from that or from the name in newer exports."""
    for new, old in member_of(config).renamed:
        if name.startswith(new):
            return old + name[len(new) :]
    return name


def newer_name(config: QwenVLConfig, name: str) -> str:
    """The name in newer exports of a tensor or module, from the Hub's."""
    for new, old in member_of(config).renamed:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def find_tensors(folder: Path, config: QwenVLConfig) -> dict[str, StoredTensor]:
    """The tensor of each canonical name, from the files' headers alone.

    Raises:
      UserError: a missing, extra or wrongly shaped tensor, or a broken file.
    """
    found = _stored(folder, config)
    _check(folder, config, found)
    return found


def _stored(folder: Path, config: QwenVLConfig) -> dict[str, StoredTensor]:
    found = {}
    for path in _files(folder):
        check_regular(path, FETCH)
        try:
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_slice(name)
                    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                    known = canonical_name(config, name)
                    if other := found.get(known):
                        raise UserError(
                            f"{path} and {other.path} both hold the tensor {known}: keep the "
                            "files of one model alone."
                        )
                    found[known] = StoredTensor(path, name, shape, dtype)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}): fetch it again.") from None
    return found


def has_own_head(folder: Path, config: QwenVLConfig) -> bool:
    """Whether a folder's head differs from its embedding, although its config ties the two.

    Raises:
      UserError: no file, or a broken one.
    """
    stored = _stored(folder, config)
    head, embed = (stored.get(config_name) for config_name in (HEAD, EMBED))
    if not config.tie_word_embeddings or head is None or embed is None:
        return False
    if not {head.dtype, embed.dtype} <= DTYPES.keys():
        return False  # refused when they are read
    tensors = []
    for tensor in (head, embed):
        with safe_open(tensor.path, "np") as file:
            tensors.append(file.get_tensor(tensor.name))
    return not np.array_equal(*tensors)


def _files(folder: Path) -> list[Path]:
    """The files of a model's weights; a single file comes before shards, as in Transformers."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = _listed(index)
    if not files:
        raise UserError(_without_weights(folder))
    return files


def _listed(index: Path) -> list[Path]:
    """The files that an index names; raises `UserError` where one of them is not there."""
    names = JsonObject(read_object(index).get("weight_map", dict), str(index), prefix="weight_map.")
    listed = {names.get(tensor, str) for tensor in names.values}
    if outside := [name for name in sorted(listed) if Path(name).name != name]:
        raise UserError(f"{index} names {outside[0]}, which is in another folder: fetch it again.")
    files = sorted(index.parent / name for name in listed)
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} cannot be read (it is not there, though {index.name} names it): fetch "
            "both again."
        )
    return files


def _without_weights(folder: Path) -> str:
    """Why a folder has no weights that are read, and what to do."""
    for place in (folder, folder.parent):
        if any(place.glob("model_world_size_*_rank_*.pt")):
            return (
                f"{place} holds a model in verl's FSDP shards: merge them with convert from-fsdp "
                f"{place} OUT, and give OUT."
            )
    if any(folder.glob("*.bin")):
        return (
            f"{folder} has its weights in *.bin files, which are not read: save the model again "
            "with Transformers, which writes safetensors."
        )
    return f"{folder} holds no *.safetensors file: fetch the model's weights first."


def _check(folder: Path, config: QwenVLConfig, stored: dict[str, StoredTensor]) -> None:
    expected = {n: entry.hub_shape for entry in entries(config) for n in entry.hub_names}
    missing = sorted(expected.keys() - stored.keys())
    extra = sorted(stored.keys() - expected.keys())
    if config.tie_word_embeddings and HEAD in extra:
        extra.remove(HEAD)
    extra = [name for name in extra if not re.search(r"rotary_emb\.inv_freq$", name)]
    for what, names in (("lacks", missing), ("also holds", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{folder} {what} the tensor {names[0]}{more}: it does not fit its config.json."
            )
    for name, shape in expected.items():
        found = stored[name]
        if found.shape != shape:
            raise UserError(
                f"{folder}: {name} has shape {found.shape}, but config.json asks for {shape}."
            )
        if found.dtype not in DTYPES:
            raise UserError(
                f"{folder}: {name} holds {found.dtype} numbers, as quantised weights do, which are "
                "not read: give the model that it was made from."
            )


def write_params(
    folder: Path,
    config: QwenVLConfig,
    params: Params,
    dtype: str | None = None,
    shard_bytes: int = 4 << 30,
) -> None:
    """Writes hub-named safetensors shards with an index into an existing folder.

    Args:
      folder: where the files go.
      config: the model's shape.
      params: the parameter tree, any floating dtype.
      dtype: what to write, `float32` or `bfloat16`; None keeps each parameter's own.
      shard_bytes: bytes after which a new shard begins.
    """
    flat = flatten_params(params)
    shards, sizes, names = [{}], [0], {}
    for entry in entries(config):
        array = flat[entry.path]
        array = np.asarray(jax.device_get(array.astype(dtype or array.dtype)))
        for i, name in enumerate(entry.hub_names):
            tensor = entry.to_hub(array[i] if entry.layers else array)
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
