"""Sources of pictures: `open_source("folder:/data/coco")`; one file a kind."""

import difflib
import os

from spatial_ssrl_jax.data.sources.base import Source
from spatial_ssrl_jax.data.sources.diode import open_diode
from spatial_ssrl_jax.data.sources.folder import open_folder
from spatial_ssrl_jax.data.sources.megadepth import open_megadepth
from spatial_ssrl_jax.data.sources.nyu import open_nyu
from spatial_ssrl_jax.data.sources.rgbd import open_rgbd
from spatial_ssrl_jax.data.sources.scenes import open_scenes
from spatial_ssrl_jax.errors import UserError

# Each takes the whole SPEC and what stands behind its first colon.
OPENERS = {
    "scenes": open_scenes,
    "folder": open_folder,
    "rgbd": open_rgbd,
    "diode": open_diode,
    "megadepth": open_megadepth,
    "nyu": open_nyu,
}

__all__ = ["OPENERS", "Source", "open_source"]


def open_source(spec: str) -> Source:
    """Opens a source by its SPEC, `KIND` or `KIND:ARGUMENT`; lists files, reads no pixels.

    Raises:
      UserError: the kind is unknown, or the folder is missing or holds no picture of that kind.
    """
    kind, _, argument = spec.partition(":")
    if kind not in OPENERS:
        raise UserError(_unknown(spec, kind))
    return OPENERS[kind](spec, argument)


def _unknown(spec: str, kind: str) -> str:
    known = ", ".join(OPENERS)
    if os.path.exists(spec):
        return f"source '{spec}' names no kind; did you mean 'folder:{spec}'? Kinds: {known}."
    nearest = difflib.get_close_matches(kind.lower(), OPENERS, n=1, cutoff=0.0)[0]
    return (
        f"source '{spec}' has the unknown kind '{kind}'; did you mean '{nearest}'? Kinds: {known}."
    )
