"""Dynamic sampling (DAPO, arXiv 2503.14476): other prompts in place of groups without variance."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import numpy as np

from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.parallel.collectives import all_sum
from spatial_ssrl_jax.rl.step_metrics import ScoredRollout
from spatial_ssrl_jax.rollout.engine import Rollout

Element = TypeVar("Element")


def zero_variance_groups(scored: ScoredRollout) -> np.ndarray:
    """[b] bool: all samples of the group are right, or all are wrong."""
    accuracy = np.array([[r.accuracy for r in group] for group in scored.rewards])
    return accuracy.max(axis=1) == accuracy.min(axis=1)


def resample_groups(
    batch: Batch,
    scored: ScoredRollout,
    draw: Callable[[int], tuple[Batch, ScoredRollout]],
    rounds: int,
) -> tuple[Batch, ScoredRollout, int]:
    """Replaces groups whose accuracy does not vary by others that vary, as far as some are found.

    Each process replaces its own groups, and all draw until none is left anywhere or the rounds are
    used up.

    Args:
      batch, scored: this process's groups.
      draw: the sampled and scored groups of round 1, 2, …; as many as `batch` has.
      rounds: draws at most.

    Returns:
      The groups to train on, and how many more prompts this process sampled.
    """
    sampled = 0
    for number in range(1, rounds + 1):
        replaced = np.flatnonzero(zero_variance_groups(scored))
        if all_sum(len(replaced)) == 0:
            break
        more, more_scored = draw(number)
        sampled += len(more.items)
        rows = np.flatnonzero(~zero_variance_groups(more_scored))
        count = min(len(replaced), len(rows))
        batch, scored = replace_groups(
            batch, scored, replaced[:count], more, more_scored, rows[:count]
        )
    return batch, scored, sampled


def replace_groups(
    batch: Batch,
    scored: ScoredRollout,
    replaced: np.ndarray,
    more: Batch,
    more_scored: ScoredRollout,
    rows: np.ndarray,
) -> tuple[Batch, ScoredRollout]:
    """The groups with those at `replaced` replaced by the `rows` of `more`, in order."""

    def put(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        merged = np.array(old)
        merged[replaced] = np.asarray(new)[rows]
        return merged

    def put_list(old: Sequence[Element], new: Sequence[Element]) -> list[Element]:
        merged = list(old)
        for index, row in zip(replaced, rows, strict=True):
            merged[index] = new[row]
        return merged

    rollout = Rollout(
        *(
            put(getattr(scored.rollout, f.name), getattr(more_scored.rollout, f.name))
            for f in fields(Rollout)
        )
    )
    return (
        replace(batch, items=tuple(put_list(batch.items, more.items))),
        ScoredRollout(
            rollout,
            put_list(scored.texts, more_scored.texts),
            put_list(scored.rewards, more_scored.rewards),
            put(scored.advantage, more_scored.advantage),
        ),
    )
