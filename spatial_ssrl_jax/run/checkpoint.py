"""Checkpoints of a run, by Orbax: asynchronous, complete before an older one goes.

A run's `checkpoints/` holds one folder a step, named by the number of steps done, with the items
`params`, `training` (optimizer and counters) and `meta` (JSON), and beside them `model/` with the
model's config, tokenizer and processor files, so that a step's folder alone can be served.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from spatial_ssrl_jax.errors import UserError
from spatial_ssrl_jax.learn.update import TrainState
from spatial_ssrl_jax.qwen2_5_vl.model import Params

PARAMS = "params"
MODEL = "model"


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: the run's `checkpoints/`; may be `gs://…`.
      keep: newest checkpoints kept.
      always: steps that are kept whatever their age.
    """

    def __init__(self, folder: str, keep: int, always: Iterable[int] = ()):
        policies = checkpoint_managers
        self.folder = epath.Path(folder)
        self._manager = ocp.CheckpointManager(
            self.folder.resolve() if "://" not in folder else self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), policies.CustomSteps(list(always))]
                ),
                create=True,
                enable_async_checkpointing=True,
            ),
            item_names=(PARAMS, "training", "meta"),
        )

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Begins to save; returns once the arrays are copied from the devices."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                training=ocp.args.StandardSave(_training(state)),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads one checkpoint into the shapes and shardings of `like`.

        Returns:
          The state and the JSON that was saved with it.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_abstract(like.params)),
                training=ocp.args.StandardRestore(_abstract(_training(like))),
                meta=ocp.args.JsonRestore(),
            ),
        )
        training = restored["training"]
        state = TrainState(
            restored[PARAMS], training["opt_state"], training["updates"], training["skipped"]
        )
        return state, restored["meta"]

    def restore_params(self, step: int, like: Params) -> Params:
        """Reads only the weights of one checkpoint."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(like)))
        return self._manager.restore(step, args=args)[PARAMS]

    def read_meta(self, step: int) -> dict[str, Any]:
        """Reads only the JSON of one checkpoint."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["meta"]

    def wait(self) -> None:
        """Returns when every save begun is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def save_params(folder: Path, params: Params) -> None:
    """Writes weights alone, as `convert to-orbax` leaves them."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(epath.Path(folder).resolve(), params)


def load_params(folder: Path, like: Params, keep_dtype: bool = False) -> Params:
    """Reads weights alone into the shapes and shardings of `like`.

    Args:
      folder: what `save_params` wrote, or the `params` of a run's checkpoint.
      like: arrays or `jax.ShapeDtypeStruct`s.
      keep_dtype: take the dtypes from the folder instead.

    Raises:
      UserError: the folder is not a checkpoint of this shape.
    """
    try:
        with ocp.StandardCheckpointer() as reader:
            path, like = epath.Path(folder).resolve(), _abstract(like)
            if keep_dtype:
                stored = reader.metadata(path).item_metadata.tree
                like = jax.tree.map(lambda x, m: x.update(dtype=m.dtype), like, stored)
            return reader.restore(path, like)
    except (ValueError, FileNotFoundError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder} is not a checkpoint of this model ({first}).") from error


def _training(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "updates": state.updates, "skipped": state.skipped}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )
