"""Whether depth maps may be inverse or upside down: the ground is near, and at the bottom."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from spatial_ssrl_jax.common.errors import BadImage
from spatial_ssrl_jax.data.sources import AnySource
from spatial_ssrl_jax.data.sources.mixture import MixturePart, mixture_parts
from spatial_ssrl_jax.data.sources.options import split_options
from spatial_ssrl_jax.tasks.example import Task
from spatial_ssrl_jax.tasks.record import Record

_PICTURES = 16  # of a part, drawn at random


def depth_warnings(source: AnySource, tasks: Iterable[Task[Any]]) -> list[str]:
    """A sentence for each part of a source in most of whose pictures the bottom is farthest.

    A few pictures are read for it. Sources without files are right by construction.

    Args:
      source: what questions are made of.
      tasks: parts that serve none of them with depth are not read.
    """
    needs_depth, found = [task for task in tasks if task.needs_depth], []
    for part in mixture_parts(source):
        if part.source.inputs and any(part.serves(task) for task in needs_depth):
            farther = _farther_below(part)
            if 2 * sum(farther) > len(farther):
                found.append(_sentence(part.source.spec, sum(farther), len(farther)))
    return found


def _sentence(spec: str, count: int, pictures: int) -> str:
    distance = split_options(spec, spec)[1].depth == "distance"
    fix = (
        "end its SPEC with ,depth=inverse or ,depth=relative-inverse"
        if distance
        else "leave depth= out of its SPEC"
    )
    return (
        f"in {count} of {pictures} pictures of {spec} the lower third is farther than the upper, "
        f"which is rare: if larger values are {'nearer' if distance else 'farther'}, {fix}; if the "
        "maps are upside down, turn them"
    )


def _farther_below(part: MixturePart) -> list[bool]:
    """For some pictures of a part, whether the lower third is farther than the upper."""
    found, rng = [], np.random.default_rng(0)
    size = len(part.source)
    for index in rng.choice(size, min(size, 2 * _PICTURES), replace=False).tolist():
        try:
            record = part.source[index]
        except BadImage:
            continue
        if isinstance(record, Record) and record.depth is not None:
            found.append(lower_is_farther(record.depth))
        if len(found) == _PICTURES:
            break
    return found


def lower_is_farther(depth: np.ndarray) -> bool:
    """Compares medians of the first and the last third of the rows that have depth.

    Args:
      depth: [H, W] float32, NaN where invalid, not everywhere.
    """
    rows = np.flatnonzero(np.isfinite(depth).any(axis=1))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    third = -(-(bottom - top) // 3)
    upper, lower = depth[top : top + third], depth[bottom - third : bottom]
    return bool(np.nanmedian(lower) > np.nanmedian(upper))
