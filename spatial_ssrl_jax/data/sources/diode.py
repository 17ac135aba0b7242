"""`diode:PATH`: DIODE as it is unpacked, or any folder of it: indoors and outdoors, in metres.

NAME.png goes with NAME_depth.npy ([H, W, 1] float32, metres) and NAME_depth_mask.npy ([H, W],
1 = valid). Without its mask a depth map holds many wrong values, so the mask is not optional here.
"""

import os

import numpy as np

from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget, first_existing, read_depth
from spatial_ssrl_jax.data.sources.files import FileSource, list_files, require_images

LAYOUT = "DIODE's NAME.png with NAME_depth.npy and NAME_depth_mask.npy beside it"


def open_diode(spec: str, path: str, reading: Reading = READING) -> FileSource:
    """Lists DIODE's images below `path`; raises `UserError` if there are none."""
    root, files = list_files(spec, path, LAYOUT)
    stems = {file.removesuffix("_depth.npy") for file in files if file.endswith("_depth.npy")}
    images = [file for file in files if file.endswith(".png")]
    if not any(file.removesuffix(".png") in stems for file in images):
        images = []
    return FileSource(spec, root, require_images(spec, root, images, LAYOUT), diode_depth, reading)


def diode_depth(image_path: str, target: DepthTarget) -> np.ndarray:
    """Depth of the image at path `image_path`: [H, W] float32 metres, NaN = invalid."""
    stem = os.path.splitext(image_path)[0]
    depth = first_existing([stem + "_depth.npy"], image_path)
    return read_depth(depth, target, stem + "_depth_mask.npy")
