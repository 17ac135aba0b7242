"""Weights in Orbax folders: saving, loading, and finding them in a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from spatial_ssrl_jax.common.errors import UserError, bucket_error
from spatial_ssrl_jax.common.paths import absolute
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.qwen_vl.model import Params

Tree = TypeVar("Tree")

PARAMS = "params"
META = "meta"


def save_params(folder: epath.PathLike, params: Params) -> None:
    """Writes weights without a training state, as `convert to-orbax` does."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(absolute(folder), params, force=True)


def is_complete(folder: epath.Path) -> bool:
    """Whether Orbax finished writing a folder."""
    return folder.exists() and ocp.utils.is_checkpoint_finalized(folder)


def weight_folders(folder: epath.PathLike) -> list[epath.Path]:
    """The folders of a checkpoint's weights: the trained ones, and the frozen ones if any.

    Args:
      folder: a step of a run's `checkpoints/`, or a folder that `convert to-orbax` wrote.
    """
    folder = epath.Path(folder)
    found = [folder / PARAMS]
    if (folder / META).is_dir():
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            frozen = reader.restore(absolute(folder / META))["frozen"]
        if frozen:
            found.append(folder.parent / frozen)
    return found


def stored_params(folder: epath.PathLike) -> Params:
    """The tree of weights in a folder, as `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: the folder holds no weights.
    """
    with _explain_load_errors(folder):
        stored = ocp.StandardCheckpointHandler().metadata(absolute(folder)).tree
        return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), stored)


def load_params(folder: epath.PathLike, like: Params, keep_dtype: bool = False) -> Params:
    """Reads weights into the shapes, dtypes and shardings of `like`.

    Args:
      folder: a folder that `save_params` wrote, or the `params` of a run's checkpoint.
      like: arrays or `jax.ShapeDtypeStruct`s.
      keep_dtype: keep the dtypes of the folder instead.

    Raises:
      UserError: the folder is not a checkpoint of this shape.
    """
    with _explain_load_errors(folder), ocp.StandardCheckpointer() as reader:
        like = abstract_like(like)
        if keep_dtype:
            like = jax.tree.map(lambda x, m: x.update(dtype=m.dtype), like, stored_params(folder))
        return reader.restore(absolute(folder), like)


@contextmanager
def _explain_load_errors(folder: epath.PathLike) -> Iterator[None]:
    try:
        yield
    except (ValueError, FileNotFoundError, KeyError) as error:
        if bucket_error(error):
            raise  # `explain` has a message for it
        raise UserError(
            f"{folder} is not a checkpoint of this model ({error_line(error)})."
        ) from error


def abstract_like(tree: Tree) -> Tree:
    """Shapes, dtypes and shardings of a tree of arrays, as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )
