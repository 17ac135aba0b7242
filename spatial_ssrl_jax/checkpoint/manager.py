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

from spatial_ssrl_jax.checkpoint.checksums import find_damage, write_checksums
from spatial_ssrl_jax.checkpoint.params import (
    _META,
    PARAMS,
    _abstract,
    _first_line,
    _is_whole,
    load_params,
    save_params,
)
from spatial_ssrl_jax.common.errors import UserError, bucket_error
from spatial_ssrl_jax.common.paths import absolute, in_bucket
from spatial_ssrl_jax.rl.train_step import TrainState

MODEL = "model"

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
                # `set_aside_damaged` does: Orbax would beside us, and take away frozen weights
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
            after = f"resumes after step {good}" if good is not None else "starts anew"
            local = _first_line(error), "free space there or fix its permissions"
            why, mend = bucket_error(error) or local
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


def set_aside_damaged(folder: epath.PathLike, say: Callable[[str], None]) -> None:
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
        wrong = find_damage(folder / str(step))
        if wrong is None:
            return
        number = sum(p.name.startswith(f"damaged_{step}") for p in folder.iterdir())
        kept = folder / (f"damaged_{step}" + (f"_{number}" if number else ""))
        (folder / str(step)).rename(kept)
        say(f"the checkpoint of step {step} is damaged ({wrong}): passed over, kept as {kept}")


def _training(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "updates": state.updates, "skipped": state.skipped}
