"""The record of a source: one image, perhaps with its depth."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Record:
    """One image of a source.

    Attributes:
      image: [H, W, 3] uint8, upright RGB.
      depth: [H, W] float32 at the image's own size, or None. Larger is farther; metres where the
        source knows them, else up to scale. NaN marks a pixel without a valid depth.
      name: identifies the record inside its source: a relative path or an id.
      spec: the source's SPEC as the user wrote it, for example `nyu:/data/nyu`.
      path: where the image came from (a file), or its id for a source without files.
      turned: whether its EXIF orientation turned it, so that its file's pixels are another way up.
    """

    image: np.ndarray
    depth: np.ndarray | None
    name: str
    spec: str
    path: str
    turned: bool = False
