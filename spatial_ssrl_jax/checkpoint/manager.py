"""Checkpoints of a run, by Orbax: asynchronous; an old one is removed after a new one is complete.

A run's `checkpoints/` holds one folder a step, named by the number of steps done, with the items
`params` (the trained weights), `training` (optimizer and counters) and `meta` (JSON). Frozen
weights, such as the base under adapters, are written once, to `frozen_sft/` or `frozen_grpo/`;
`meta` names the folder that belongs to the step. `model/` has the model's config, tokenizer and
processor files, so that a step can be served from this folder alone.

Each step's folder holds checksums of its files, written before Orbax finalises it, so that a
damaged one is found and skipped.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from spatial_ssrl_jax.checkpoint.checksums import find_damage, write_checksums
from spatial_ssrl_jax.checkpoint.params import (
    META,
    PARAMS,
    abstract_like,
    explain_load_errors,
    is_complete,
    load_params,
    save_params,
)
from spatial_ssrl_jax.common.errors import UserError, bucket_error, disk_problem
from spatial_ssrl_jax.common.json_file import JsonObject, as_object
from spatial_ssrl_jax.common.paths import absolute, in_bucket
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.parallel.collectives import is_primary
from spatial_ssrl_jax.rl.train_step import TrainState

MODEL = "model"
_TRAINING = "training"
RENAME = "rename the newest step, and the same command resumes after the one before it"
_FROZEN = "frozen_{}"


@dataclass
class _KeepBest:
    """Orbax's preservation policy for the best step, which may change."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        return [info.step == self.step for info in checkpoints]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: the run's `checkpoints/`; may be `gs://…`.
      keep: number of newest checkpoints kept.
      always: steps that are always kept.
    """

    def __init__(self, folder: epath.PathLike, keep: int, always: Iterable[int] = ()):
        policies = checkpoint_managers
        self.folder = epath.Path(folder)
        self._saving = 0
        self._best = _KeepBest()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), policies.CustomSteps(list(always)), self._best]
            ),
            create=True,
            # `set_aside_damaged` removes them: Orbax would also remove frozen weights that are
            # being written, or in a bucket `model/` as an unfinished step.
            cleanup_tmp_directories=False,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        with explain_load_errors(self.folder, RENAME):
            self._manager = ocp.CheckpointManager(
                absolute(self.folder), options=options, item_names=(PARAMS, _TRAINING, META)
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
        """Starts a save; returns once the arrays are copied from the devices.

        Args:
          step: steps done in the run.
          stage: the stage's name; its frozen weights are written with its first checkpoint.
          state: the state to save.
          meta: JSON that `restore` returns.
          best: the step that is kept as the best, this one or an earlier one; None keeps none.

        Raises:
          UserError: this save or the previous one failed.
        """
        with self._explain_save_errors():
            self._manager.wait_until_finished()
            self._saving = step
            self._best.step = best
            frozen = _FROZEN.format(stage) if state.frozen else None
            if frozen and not is_complete(self.folder / frozen):
                save_params(self.folder / frozen, state.frozen)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.trained),
                    training=ocp.args.StandardSave(_training(state)),
                    meta=ocp.args.JsonSave({"frozen": frozen, "run": meta}),
                ),
            )

    def _write_checksums(self) -> None:
        """Writes the checksums of the step being saved, before Orbax finalises it."""
        if is_primary():
            name = f"{self._saving}" if in_bucket(self.folder) else f"{self._saving}.*tmp*"
            for folder in self.folder.glob(name):
                write_checksums(folder)

    @contextmanager
    def _explain_save_errors(self) -> Iterator[None]:
        """Turns an error of a save into a `UserError`; older checkpoints stay."""
        try:
            yield
        except Exception as error:  # Orbax raises any error of its writers
            good = self._manager.latest_step()
            after = f"resumes after step {good}" if good is not None else "starts anew"
            local = disk_problem(error) or error_line(error), "free space or fix its permissions"
            why, fix = bucket_error(error) or local
            raise UserError(
                f"step {self._saving} could not be saved to {self.folder} ({why}): {fix}; the "
                f"same command then {after}."
            ) from error

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads one checkpoint into the shapes, dtypes and shardings of `like`.

        Returns:
          The state, and the JSON that was saved with it.

        Raises:
          UserError: it is damaged, or of another shape.
        """
        restored = self._read(
            step,
            params=ocp.args.StandardRestore(abstract_like(like.trained)),
            training=ocp.args.StandardRestore(abstract_like(_training(like))),
        )
        meta, training = self._meta(step, restored), restored[_TRAINING]
        frozen = meta.find("frozen", str)
        state = TrainState(
            trained=restored[PARAMS],
            frozen=load_params(self.folder / frozen, like.frozen) if frozen else {},
            opt_state=training["opt_state"],
            updates=training["updates"],
            skipped=training["skipped"],
        )
        return state, meta.get("run", dict)

    def read_meta(self, step: int) -> dict[str, Any]:
        """Reads the JSON of one checkpoint alone; raises `UserError` where it is damaged."""
        return self._meta(step, self._read(step)).get("run", dict)

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        with explain_load_errors(self.folder / str(step), RENAME):
            args = ocp.args.Composite(meta=ocp.args.JsonRestore(), **items)
            return self._manager.restore(step, args=args)

    def _meta(self, step: int, restored: Any) -> JsonObject:
        return as_object(restored[META], os.fspath(self.folder / str(step) / META), RENAME)

    def wait(self) -> None:
        """Waits until every save is complete.

        Raises:
          UserError: one failed.
        """
        with self._explain_save_errors():
            self._manager.wait_until_finished()

    def settle(self) -> None:
        """Waits for a save before a run ends on an error; its own errors are ignored."""
        with suppress(Exception):  # the run's error is reported
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def set_aside_damaged(folder: epath.PathLike, say: Callable[[str], None]) -> None:
    """Renames damaged checkpoints, from the newest back to the first that is not damaged.

    Unfinished ones are removed; in a bucket they have the same names as finished ones.

    Args:
      folder: a run's `checkpoints/`.
      say: called with a message for each damaged one.
    """
    folder = epath.Path(folder)
    if not folder.exists():
        return
    for unfinished in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        unfinished.rmtree()
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()]
    for step in sorted(steps, reverse=True):
        if not is_complete(folder / str(step)):
            (folder / str(step)).rmtree()
            continue
        damage = find_damage(folder / str(step))
        if damage is None:
            return
        number = sum(p.name.startswith(f"damaged_{step}") for p in folder.iterdir())
        kept = folder / (f"damaged_{step}" + (f"_{number}" if number else ""))
        (folder / str(step)).rename(kept)
        say(f"the checkpoint of step {step} is damaged ({damage}): skipped, kept as {kept}")


def _training(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "updates": state.updates, "skipped": state.skipped}
