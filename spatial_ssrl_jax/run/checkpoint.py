"""Checkpoints of a run, by Orbax: asynchronous, complete before an older one goes.

A run's `checkpoints/` holds one folder a step, named by the number of steps done, with the items
`params` (the weights that train), `training` (optimizer and counters) and `meta` (JSON). Weights
that a stage does not train, the base under adapters for one, are written once, to `frozen_sft/` or
`frozen_grpo/`; `meta` says which of them belongs to the step. `model/` has the model's config,
tokenizer and processor files, so that a step can be served from this folder alone.

Each step's folder holds checksums of its files, written before it gets its name, so that one that
was damaged later is found and passed over.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from spatial_ssrl_jax.errors import UserError, bucket_trouble
from spatial_ssrl_jax.folders import absolute, in_bucket
from spatial_ssrl_jax.learn.update import TrainState
from spatial_ssrl_jax.qwen2_5_vl.model import Params
from spatial_ssrl_jax.run.checksums import damage, write_checksums

PARAMS = "params"
MODEL = "model"
_META = "meta"
_TRAINING = "training"
_FROZEN = "frozen_{}"


@dataclass
class _Best:
    """Orbax's preservation policy for one step, which may change."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> list[bool]:
        return [info.step == self.step for info in checkpoints]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: the run's `checkpoints/`; may be `gs://…`.
      keep: newest checkpoints kept.
      always: steps that are kept whatever their age.
    """

    def __init__(self, folder: epath.PathLike, keep: int, always: Iterable[int] = ()):
        policies = checkpoint_managers
        self.folder = epath.Path(folder)
        self._saving = 0
        self._best = _Best()
        self._manager = ocp.CheckpointManager(
            absolute(self.folder),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), policies.CustomSteps(list(always)), self._best]
                ),
                create=True,
                # `pass_over_damaged` does: Orbax would beside us, and take away frozen weights
                # that are just being written, or in a bucket `model/` for an unfinished step.
                cleanup_tmp_directories=False,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._sum),
            ),
            item_names=(PARAMS, _TRAINING, _META),
        )

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        stage: str,
        state: TrainState,
        meta: dict[str, Any],
        best: int | None = None,
    ) -> None:
        """Begins to save; returns once the arrays are copied from the devices.

        Args:
          step: steps done in the run.
          stage: the stage's name; its frozen weights are written at its first checkpoint.
          state: what to save.
          meta: JSON that `restore` gives back.
          best: the step, this one or one before, that stays as the best; None: no such one.

        Raises:
          UserError: this one or the one before could not be written.
        """
        with self._explained():
            self._manager.wait_until_finished()
            self._saving = step
            self._best.step = best
            frozen = _FROZEN.format(stage) if state.frozen else None
            if frozen and not _is_whole(self.folder / frozen):
                save_params(self.folder / frozen, state.frozen)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.trained),
                    training=ocp.args.StandardSave(_training(state)),
                    meta=ocp.args.JsonSave({"frozen": frozen, "run": meta}),
                ),
            )

    def _sum(self) -> None:
        """Notes the checksums of the step being saved, before Orbax calls it complete."""
        if jax.process_index() == 0:
            name = f"{self._saving}" if in_bucket(self.folder) else f"{self._saving}.*tmp*"
            for folder in self.folder.glob(name):
                write_checksums(folder)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says in a sentence why a checkpoint could not be written; older ones stay."""
        try:
            yield
        except Exception as error:  # Orbax hands on whatever its writers meet
            good = self._manager.latest_step()
            after = f"goes on after step {good}" if good is not None else "starts anew"
            local = _first_line(error), "free space there or mend its permissions"
            why, mend = bucket_trouble(error) or local
            raise UserError(
                f"step {self._saving} could not be saved to {self.folder} ({why}): {mend}; the "
                f"same command then {after}."
            ) from error

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads one checkpoint into the shapes, dtypes and shardings of `like`.

        Returns:
          The state and the JSON that was saved with it.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_abstract(like.trained)),
                training=ocp.args.StandardRestore(_abstract(_training(like))),
                meta=ocp.args.JsonRestore(),
            ),
        )
        frozen, training = restored[_META]["frozen"], restored[_TRAINING]
        state = TrainState(
            trained=restored[PARAMS],
            frozen=load_params(self.folder / frozen, like.frozen) if frozen else {},
            opt_state=training["opt_state"],
            updates=training["updates"],
            skipped=training["skipped"],
        )
        return state, restored[_META]["run"]

    def read_meta(self, step: int) -> dict[str, Any]:
        """Reads only the JSON of one checkpoint."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)[_META]["run"]

    def wait(self) -> None:
        """Returns when every save begun is complete.

        Raises:
          UserError: one could not be written.
        """
        with self._explained():
            self._manager.wait_until_finished()

    def settle(self) -> None:
        """Lets a save under way come to its end before a run ends on an error."""
        with suppress(Exception):  # what ends the run is said already
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def pass_over_damaged(folder: epath.PathLike, say: Callable[[str], None]) -> None:
    """Renames the newest checkpoints that are not as they were written, until a whole one comes.

    What was never complete goes; only in a bucket has a step then a name like the others.

    Args:
      folder: a run's `checkpoints/`.
      say: is told of each.
    """
    folder = epath.Path(folder)
    if not folder.exists():
        return
    for unfinished in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        unfinished.rmtree()
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()]
    for step in sorted(steps, reverse=True):
        if not _is_whole(folder / str(step)):
            (folder / str(step)).rmtree()
            continue
        wrong = damage(folder / str(step))
        if wrong is None:
            return
        number = sum(p.name.startswith(f"damaged_{step}") for p in folder.iterdir())
        kept = folder / (f"damaged_{step}" + (f"_{number}" if number else ""))
        (folder / str(step)).rename(kept)
        say(f"the checkpoint of step {step} is damaged ({wrong}): passed over, kept as {kept}")


def save_params(folder: epath.PathLike, params: Params) -> None:
    """Writes weights alone, as `convert to-orbax` leaves them."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(absolute(folder), params, force=True)


def _is_whole(folder: epath.Path) -> bool:
    """Whether Orbax finished writing a folder."""
    return folder.exists() and ocp.utils.is_checkpoint_finalized(folder)


def weight_folders(folder: epath.PathLike) -> list[epath.Path]:
    """Where the weights of a step, or of what `convert to-orbax` wrote, lie: one or two folders."""
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
        if bucket_trouble(error):
            raise  # is said as such
        raise UserError(
            f"{folder} is not a checkpoint of this model ({_first_line(error)})."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _training(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "updates": state.updates, "skipped": state.skipped}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree,
    )
