"""`folder:PATH`: every image below a folder, without depth.

What is known to be a depth map or its mask is no photo, and is left out: a file of an `rgbd:` pair,
and a 16-bit grey image that has `depth` in its name or is among its like, unless all images are.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

from spatial_ssrl_jax.common.errors import BadImage
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.data.images import open_header
from spatial_ssrl_jax.data.sources.depth_files import IMAGE_ENDINGS
from spatial_ssrl_jax.data.sources.files import (
    FileSource,
    is_image,
    left_out,
    list_files,
    require_images,
    unreadable,
)
from spatial_ssrl_jax.data.sources.layouts import find_pairs
from spatial_ssrl_jax.data.sources.listing import Listing

LAYOUT = "a folder with .jpg, .png, .webp, .bmp, .tif or .gif images, at any depth of folders"
_DEPTH_MODES = ("I", "F")  # Pillow's modes of 16 or 32 bits begin so


def open_folder(spec: str, path: str, reading: Reading = READING) -> FileSource:
    """Lists the images below `path`; raises `UserError` if there are none."""
    root, files = list_files(spec, path, LAYOUT)
    images = [file for file in files if is_image(file)]
    depths = set(_depth_maps(root, files, images))
    photos = [file for file in images if file not in depths] or images
    notes = unreadable(files)
    if len(photos) < len(images):
        notes += left_out(sorted(depths.intersection(images)), "depth maps and masks")
    listed = require_images(spec, root, photos, LAYOUT, notes)
    return FileSource(spec, root, listed, None, reading, notes)


def _depth_maps(root: str, files: Sequence[str], images: Sequence[str]) -> Iterator[str]:
    """Depth files and masks of `rgbd:` pairs, then images that are depth by name and header."""
    known: set[str | None] = set()
    for pairs in find_pairs(Listing(root, files)).values():
        known |= {file for pair in pairs for file in (pair.depth, pair.mask)}
    yield from filter(None, known)
    folders: dict[str, bool] = {}  # whether a folder's first image is deep, as its others may be
    for file in images:
        if file in known or not file.lower().endswith(IMAGE_ENDINGS):
            continue
        folder, name = os.path.split(file)
        if folder not in folders:
            folders[folder] = _is_deep(root, file)
        if (folders[folder] or "depth" in name.lower()) and _is_deep(root, file):
            yield file


def _is_deep(root: str, file: str) -> bool:
    """Whether an image's header says that it has one channel of 16 bits or more."""
    path = os.path.join(root, file)
    with suppress(BadImage, OSError), open_header(path, path) as image:
        return image.mode.startswith(_DEPTH_MODES)
    return False
