"""Reading a step that verl or EasyR1 wrote: a model in shards of PyTorch's FSDP, one file a rank.

The step's `actor/` holds `model_world_size_W_rank_R.pt` for every rank R of W, and `huggingface/`
with config, tokenizer and processor files.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from etils import epath

from spatial_ssrl_jax.checkpoint.models import ModelFolder
from spatial_ssrl_jax.checkpoint.rank_files import Piece, check_torch, read_rank_file
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.paths import local_copy, user_path
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.family import read_config
from spatial_ssrl_jax.qwen_vl.param_tree import Params, unflatten_params
from spatial_ssrl_jax.qwen_vl.weights import (
    EMBED,
    HEAD,
    Entry,
    canonical_name,
    entries,
    stack_layers,
)

if TYPE_CHECKING:
    import torch

_FIRST = re.compile(r"model_world_size_(\d+)_rank_0\.pt")
_WHICH = "give the actor/ folder of a step that verl wrote"


@dataclass(frozen=True)
class FsdpFolder:
    """A step that verl wrote, of which no weights have been read.

    Attributes:
      model: its config and processor files; `weights` is the folder of the shards.
      shards: the file of each rank, in order; those of ranks that hold copies may be missing.
    """

    model: ModelFolder
    shards: tuple[Path, ...]

    @property
    def inputs(self) -> tuple[epath.PathLike, ...]:
        """Files and folders that are read."""
        return (*self.model.inputs, *map(os.path.realpath, self.shards))

    def load(self, dtype: str | None) -> tuple[ModelFolder, Params]:
        """Merges the shards, one file after another.

        The host holds the model once, in `dtype`, beside the pages of the file that is read, and
        then its largest parameter twice.

        Args:
          dtype: of the result; None keeps the dtypes of the files.

        Returns:
          The model, with a head of its own where that differs from the embedding; and its
          parameters, as NumPy arrays.

        Raises:
          UserError: a file is missing or damaged, needs more than tensors, or does not fit; or a
            tensor is not finite.
        """
        model, config = self.model, self.model.config
        tensors = _merge(self.shards, config, dtype)
        if config.tie_word_embeddings:
            head = tensors.get(HEAD)
            if head is not None and not np.array_equal(head, tensors[EMBED]):
                model = replace(model, config=replace(config, tie_word_embeddings=False))
        flat = {entry.path: _take(entry, tensors) for entry in entries(model.config)}
        return model, unflatten_params(flat)


def open_fsdp(path: str) -> FsdpFolder:
    """Opens a step's `actor/` folder, which may be in a bucket, without reading its weights.

    Raises:
      UserError: the shards, the config or torch are missing.
    """
    place = user_path(path)
    if not place.is_dir():
        raise UserError(f"the folder {path} does not exist: {_WHICH}.")
    sizes = sorted(int(found[1]) for p in place.iterdir() if (found := _FIRST.fullmatch(p.name)))
    if not sizes:
        raise UserError(f"{path} holds no model_world_size_*_rank_0.pt: {_WHICH}.")
    if len(sizes) > 1:
        raise UserError(
            f"{path} holds shards of {sizes[0]} ranks and of {sizes[1]}: remove those of the run "
            "that you do not mean."
        )
    settings = place / "huggingface"
    if not (settings / "config.json").is_file():
        raise UserError(
            f"{settings / 'config.json'} is missing: copy the folder huggingface, which verl "
            "writes beside the shard of rank 0, too."
        )
    check_torch(path)
    files, folder = local_copy(settings), local_copy(place, "model_world_size_*.pt")
    names = [f"model_world_size_{sizes[0]}_rank_{rank}.pt" for rank in range(sizes[0])]
    model = ModelFolder(read_config(files), files, epath.Path(folder), path)
    return FsdpFolder(model, tuple(folder / name for name in names))


@dataclass
class _Whole:
    """A tensor that is filled along one axis, rank after rank."""

    tensor: "torch.Tensor"
    axis: int
    filled: int = 0

    @property
    def is_full(self) -> bool:
        return self.filled == self.tensor.shape[self.axis]

    def add(self, what: str, local: "torch.Tensor") -> None:
        """Copies what the next rank holds, unless those before it held all."""
        if self.is_full:
            return
        import torch

        left = self.tensor.narrow(
            self.axis, self.filled, self.tensor.shape[self.axis] - self.filled
        )
        part = left.narrow(self.axis, 0, min(local.shape[self.axis], left.shape[self.axis]))
        if part.shape != local.shape:
            raise UserError(
                f"{what} has shape {tuple(local.shape)}, and the ranks before it leave "
                f"{tuple(left.shape)}: copy the files of all ranks again."
            )
        if not torch.isfinite(local).all():
            raise UserError(
                f"{what} holds NaN or infinite values: give a step before they appeared."
            )
        part.copy_(local)
        self.filled += local.shape[self.axis]


def _merge(
    shards: tuple[Path, ...], config: QwenVLConfig, dtype: str | None
) -> dict[str, np.ndarray]:
    """Every tensor by its name on the Hub.

    verl's mesh is (fsdp) or (ddp, fsdp), so ranks whose shards are copies come after the first of
    each, and are not read.
    """
    shapes, whole = _shapes(config), {}
    for path in shards:
        _add_rank(whole, path, _read(path, config, shapes), dtype)
        if all(tensor.is_full for tensor in whole.values()):
            return {name: _to_numpy(x.tensor) for name, x in whole.items()}
    name, short = next((name, x) for name, x in whole.items() if not x.is_full)
    raise UserError(
        f"the shards in {shards[0].parent} hold {short.filled} of the "
        f"{short.tensor.shape[short.axis]} rows of {name}: copy the files of all ranks again."
    )


def _add_rank(
    whole: dict[str, _Whole], path: Path, pieces: Mapping[str, Piece], dtype: str | None
) -> None:
    import torch

    for name, piece in pieces.items():
        if name not in whole:
            kind = getattr(torch, dtype) if dtype else piece.local.dtype
            whole[name] = _Whole(torch.empty(piece.shape, dtype=kind), piece.axis or 0)
        whole[name].add(f"{path}: {name}", piece.local)


def _read(
    path: Path, config: QwenVLConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Piece]:
    """One rank's part of every tensor, by its name on the Hub; of tied tables perhaps of one.

    Raises:
      UserError: the file is missing, or does not fit the config.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing: copy the files of all ranks, which each node writes on its own "
            "disk, into one folder."
        )
    pieces = {canonical_name(config, name): piece for name, piece in read_rank_file(path).items()}
    if any("lora_" in name for name in pieces):
        adapter = path.parent / "lora_adapter"
        raise UserError(
            f"{path} holds LoRA adapters beside their base: merge the adapter that verl writes "
            f"with convert merge-lora BASE {adapter} OUT."
        )
    missing, extra = shapes.keys() - pieces, pieces.keys() - shapes
    if config.tie_word_embeddings:
        missing.discard(HEAD)
    for what, names in (("lacks", missing), ("also holds", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{path} {what} the tensor {min(names)}{more}: it does not fit "
                "huggingface/config.json, so copy both again."
            )
    for name, piece in pieces.items():
        if piece.shape != shapes[name]:
            raise UserError(
                f"{path}: {name} has shape {piece.shape}, but huggingface/config.json asks for "
                f"{shapes[name]}: copy both again."
            )
    return pieces


def _shapes(config: QwenVLConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor on the Hub, a head among them."""
    untied = replace(config, tie_word_embeddings=False)
    return {name: entry.hub_shape for entry in entries(untied) for name in entry.hub_names}


def _to_numpy(tensor: "torch.Tensor") -> np.ndarray:
    """The tensor's own memory; NumPy has bfloat16 from JAX."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _take(entry: Entry, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """One parameter, whose tensors are removed one by one as they are copied."""
    dtype = jnp.result_type(*(tensors[name].dtype for name in entry.hub_names))
    layers = (entry.from_hub(tensors.pop(name)) for name in entry.hub_names)
    return stack_layers(layers, entry, dtype)
