"""`rgbd:PATH`: images, each with its depth beside it; the plain layout for one's own data.

NAME.jpg or NAME.png goes with NAME_depth.png (16 bit, millimetres, 0 = invalid), NAME_depth.npy
(metres) or NAME_depth.h5 (data set `depth`, else the first), and perhaps with NAME_depth_mask.npy
(non-zero = valid).
"""

import os

import numpy as np

from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget, first_existing, read_depth
from spatial_ssrl_jax.data.sources.files import FileSource, list_files, require_images

LAYOUT = "NAME.jpg or NAME.png with NAME_depth.png, NAME_depth.npy or NAME_depth.h5 beside it"
DEPTHS = ("_depth.png", "_depth.npy", "_depth.h5")
_ENDINGS = (".jpg", ".jpeg", ".png")


def open_rgbd(spec: str, path: str, reading: Reading = READING) -> FileSource:
    """Lists images below `path`; raises `UserError` if none of them has a depth file.

    A single image without depth stays listed and raises `BadImage` when it is read, so that it is
    counted and named.
    """
    root, files = list_files(spec, path, LAYOUT)
    stems = {file.removesuffix(depth) for file in files for depth in DEPTHS if file.endswith(depth)}
    images = [file for file in files if _is_image(file)]
    if not any(os.path.splitext(file)[0] in stems for file in images):
        images = []
    return FileSource(spec, root, require_images(spec, root, images, LAYOUT), rgbd_depth, reading)


def rgbd_depth(image_path: str, target: DepthTarget) -> np.ndarray:
    """Depth of the image at path `image_path`: [H, W] float32, NaN = invalid, or `BadImage`."""
    stem = os.path.splitext(image_path)[0]
    depth = first_existing([stem + ending for ending in DEPTHS], image_path)
    mask = stem + "_depth_mask.npy"
    return read_depth(depth, target, mask if os.path.isfile(mask) else None)


def _is_image(file: str) -> bool:
    return file.lower().endswith(_ENDINGS) and not file.endswith(DEPTHS)
