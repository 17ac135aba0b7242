"""TODO: checkpoint.params."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from spatial_ssrl_jax.common.errors import UserError, bucket_error
from spatial_ssrl_jax.common.paths import absolute
from spatial_ssrl_jax.qwen_vl.model import Params

PARAMS = "params"

_META = "meta"


def save_params(folder: epath.PathLike, params: Params) -> None:
    """Writes weights alone, as `convert to-orbax` leaves them."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(absolute(folder), params, force=True)


def _is_whole(folder: epath.Path) -> bool:
    """Whether Orbax finished writing a folder."""
    return folder.exists() and ocp.utils.is_checkpoint_finalized(folder)


def weight_folders(folder: epath.PathLike) -> list[epath.Path]:
    """Where the weights of a step, or of what `convert to-orbax` wrote, are: one or two folders."""
    folder = epath.Path(folder)
    found = [folder / PARAMS]
    if (folder / _META).is_dir():
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            frozen = reader.restore(absolute(folder / _META))["frozen"]
        if frozen:
            found.append(folder.parent / frozen)
    return found


def stored_params(folder: epath.PathLike) -> Params:
    """The tree of weights that a folder holds, as `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: the folder holds no weights.
    """
    with _explained(folder):
        stored = ocp.StandardCheckpointHandler().metadata(absolute(folder)).tree
        return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), stored)


def load_params(folder: epath.PathLike, like: Params, keep_dtype: bool = False) -> Params:
    """Reads weights alone into the shapes and shardings of `like`.

    Args:
      folder: what `save_params` wrote, or the `params` of a run's checkpoint.
      like: arrays or `jax.ShapeDtypeStruct`s.
      keep_dtype: take the dtypes from the folder instead.

    Raises:
      UserError: the folder is not a checkpoint of this shape.
    """
    with _explained(folder), ocp.StandardCheckpointer() as reader:
        like = _abstract(like)
        if keep_dtype:
            like = jax.tree.map(lambda x, m: x.update(dtype=m.dtype), like, stored_params(folder))
        return reader.restore(absolute(folder), like)


@contextmanager
def _explained(folder: epath.PathLike) -> Iterator[None]:
    try:
        yield
    except (ValueError, FileNotFoundError, KeyError) as error:
        if bucket_error(error):
            raise  # is said as such
        raise UserError(
            f"{folder} is not a checkpoint of this model ({_first_line(error)})."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )
