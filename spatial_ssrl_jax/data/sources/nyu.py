"""`nyu:PATH`: NYU Depth v2 as synchronised frames, indoors, in metres.

ROOM/rgb_N.jpg goes with ROOM/sync_depth_N.png (16 bit, millimetres, 0 = invalid).
"""

import os

import numpy as np

from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget, first_existing, read_depth
from spatial_ssrl_jax.data.sources.files import FileSource, is_image, list_files, require_images

LAYOUT = "NYU Depth v2's rgb_N.jpg with sync_depth_N.png beside it"


def open_nyu(spec: str, path: str, reading: Reading = READING) -> FileSource:
    """Lists the frames below `path`; raises `UserError` if there are none."""
    root, files = list_files(spec, path, LAYOUT)
    frames = [file for file in files if is_image(file) and _is_frame(file)]
    return FileSource(spec, root, require_images(spec, root, frames, LAYOUT), nyu_depth, reading)


def nyu_depth(image_path: str, target: DepthTarget) -> np.ndarray:
    """Depth of the frame at path `image_path`: [H, W] float32 metres, NaN = invalid."""
    folder, file = os.path.split(image_path)
    number = os.path.splitext(file)[0].removeprefix("rgb_")
    depth = first_existing([os.path.join(folder, f"sync_depth_{number}.png")], image_path)
    return read_depth(depth, target)


def _is_frame(file: str) -> bool:
    return file.rsplit("/", 1)[-1].startswith("rgb_")
