"""Dynamic sampling (DAPO, arXiv 2503.14476): other prompts in place of groups that are left out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from spatial_ssrl_jax.config.schema import GrpoSettings
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.parallel.collectives import all_sum
from spatial_ssrl_jax.rl.step_metrics import ScoredRollout

Element = TypeVar("Element")


def filtered_groups(settings: GrpoSettings, scored: ScoredRollout) -> np.ndarray:
    """[b] bool: groups whose `filter_key` does not vary, or has a mean that is not in the range."""
    key = settings.filter_key
    found = np.array([[getattr(r, key) for r in group] for group in scored.rewards])
    mean, varies = found.mean(axis=1), found.max(axis=1) > found.min(axis=1)
    low, high = settings.filter_low, settings.filter_high
    above = np.ones_like(varies) if low == 0 else mean > low
    below = np.ones_like(varies) if high == 1 else mean < high
    return ~(varies & above & below)


def resample_groups(
    batch: Batch,
    scored: ScoredRollout,
    draw: Callable[[int], tuple[Batch, ScoredRollout]],
    settings: GrpoSettings,
) -> tuple[Batch, ScoredRollout, int]:
    """Replaces groups that are left out by others that are not, as far as some are found.

    Each process replaces its own groups, and all draw until none is left anywhere, `max_resamples`
    times at most.

    Args:
      batch, scored: this process's groups.
      draw: the sampled and scored groups of round 1, 2, …; as many as `batch` has.
      settings: the config's `grpo` section.

    Returns:
      The groups to train on, and how many more prompts this process sampled.
    """
    sampled = 0
    for number in range(1, settings.max_resamples + 1):
        replaced = np.flatnonzero(filtered_groups(settings, scored))
        if all_sum(len(replaced)) == 0:
            break
        more, more_scored = draw(number)
        sampled += len(more.items)
        rows = np.flatnonzero(~filtered_groups(settings, more_scored))
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

    return (
        replace(batch, items=tuple(put_list(batch.items, more.items))),
        ScoredRollout(
            scored.rollout.map(put, more_scored.rollout),
            put_list(scored.texts, more_scored.texts),
            put_list(scored.rewards, more_scored.rewards),
            put(scored.advantage, more_scored.advantage),
        ),
    )
