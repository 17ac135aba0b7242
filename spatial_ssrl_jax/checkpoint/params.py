"""Weights in Orbax folders: saving, loading, and finding them in a checkpoint."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from spatial_ssrl_jax.common.errors import UserError, explain
from spatial_ssrl_jax.common.json_file import as_object
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

    Raises:
      UserError: what names the frozen ones is damaged.
    """
    folder = epath.Path(folder)
    found = [folder / PARAMS]
    if (folder / META).is_dir():
        with explain_load_errors(folder), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(absolute(folder / META))
        frozen = as_object(meta, os.fspath(folder / META)).find("frozen", str)
        if frozen:
            found.append(folder.parent / frozen)
    return found


def stored_params(folder: epath.PathLike) -> Params:
    """The tree of weights in a folder, as `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: the folder holds no weights.
    """
    with explain_load_errors(folder):
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
    with explain_load_errors(folder), ocp.StandardCheckpointer() as reader:
        like = abstract_like(like)
        if keep_dtype:
            like = jax.tree.map(lambda x, m: x.update(dtype=m.dtype), like, stored_params(folder))
        return reader.restore(absolute(folder), like)


@contextmanager
def explain_load_errors(
    folder: epath.PathLike, fix: str = "copy it again, or use another"
) -> Iterator[None]:
    """Turns an error of reading a folder into a `UserError`, unless `explain` has a message."""
    try:
        yield
    except Exception as error:  # Orbax raises any error of its readers
        if explain(error) and not isinstance(error, FileNotFoundError):
            raise
        raise UserError(
            f"{folder} is not a checkpoint of this model, or damaged ({error_line(error)}): {fix}."
        ) from error


def abstract_like(tree: Tree) -> Tree:
    """Shapes, dtypes and shardings of a tree of arrays, as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )
