"""Sources of images and questions: `open_source("folder:/data/coco")`; one file a kind."""

import difflib
import os
from collections.abc import Sequence
from typing import Any

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.data.sources.arrayrecord import open_arrayrecord
from spatial_ssrl_jax.data.sources.base import Source
from spatial_ssrl_jax.data.sources.diode import open_diode
from spatial_ssrl_jax.data.sources.folder import open_folder
from spatial_ssrl_jax.data.sources.megadepth import open_megadepth
from spatial_ssrl_jax.data.sources.mixture import Mixture, mix, split_spec
from spatial_ssrl_jax.data.sources.nyu import open_nyu
from spatial_ssrl_jax.data.sources.options import open_with_options
from spatial_ssrl_jax.data.sources.questions import open_questions
from spatial_ssrl_jax.data.sources.rgbd import open_rgbd
from spatial_ssrl_jax.data.sources.scenes import open_scenes
from spatial_ssrl_jax.data.sources.ssrl81k import QuestionSource, open_ssrl81k
from spatial_ssrl_jax.data.sources.tfds import open_tfds
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.example import Task

# Each takes the whole SPEC, the argument after its first colon, and a `Reading`.
OPENERS = {
    "scenes": open_scenes,
    "folder": open_folder,
    "rgbd": open_rgbd,
    "diode": open_diode,
    "megadepth": open_megadepth,
    "nyu": open_nyu,
    "tfds": open_tfds,
    "arrayrecord": open_arrayrecord,
    "ssrl81k": open_ssrl81k,
    "questions": open_questions,
}

AnySource = Source | QuestionSource | Mixture

__all__ = ["OPENERS", "AnySource", "Mixture", "QuestionSource", "Reading", "Source", "open_source"]


def open_source(
    spec: str, reading: Reading = READING, tasks: Sequence[Task[Any]] = TASKS
) -> AnySource:
    """Opens a source by its SPEC: `KIND`, `KIND:ARGUMENT`, or a mixture as `flip@folder:A+2*nyu:B`.

    It lists files and reads no pixels. See each kind's file for its argument, `options` for what
    may follow it, as in `rgbd:A,depth=inverse`, and `mixture`.

    Args:
      spec: the SPEC.
      reading: how each of its parts reads its files, where its options do not say.
      tasks: that may be named before an `@`.

    Raises:
      UserError: a kind is unknown, its argument holds nothing of that kind, or a question file
        names files that are not allowed.
    """
    parts = split_spec(spec, list(OPENERS), tasks)
    opened = [(_open_one(part.spec, reading), part) for part in parts]
    alone = len(parts) == 1 and parts[0].tasks is None
    return opened[0][0] if alone else mix(spec, opened, tasks)


def _open_one(spec: str, reading: Reading) -> Source | QuestionSource:
    kind, _, argument = spec.partition(":")
    if kind not in OPENERS:
        raise UserError(_unknown(spec, kind))
    return open_with_options(OPENERS[kind], spec, argument, reading)


def _unknown(spec: str, kind: str) -> str:
    known = ", ".join(OPENERS)
    if os.path.exists(spec):
        return f"source '{spec}' names no kind; did you mean 'folder:{spec}'? Kinds: {known}."
    nearest = difflib.get_close_matches(kind.lower(), OPENERS, n=1, cutoff=0.0)[0]
    return (
        f"source '{spec}' has the unknown kind '{kind}'; did you mean '{nearest}'? Kinds: {known}."
    )
