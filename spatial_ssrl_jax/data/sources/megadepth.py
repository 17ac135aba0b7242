"""`megadepth:PATH`: MegaDepth as it is unpacked, or any folder of it: depth up to scale.

SCENE/denseN/imgs/NAME.jpg goes with SCENE/denseN/depths/NAME.h5 (data set `depth`, 0 = invalid).
Some of its files hold ordinal maps, which have negative values: they are rejected.
"""

import os

import numpy as np

from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget, first_existing, read_depth
from spatial_ssrl_jax.data.sources.files import FileSource, is_image, list_files, require_images

LAYOUT = "MegaDepth's SCENE/denseN/imgs/NAME.jpg with SCENE/denseN/depths/NAME.h5"


def open_megadepth(spec: str, path: str, reading: Reading = READING) -> FileSource:
    """Lists MegaDepth's images below `path`; raises `UserError` if there are none."""
    root, files = list_files(spec, path, LAYOUT)
    images = [file for file in files if is_image(file) and _in_imgs(root, file)]
    return FileSource(
        spec,
        root,
        require_images(spec, root, images, LAYOUT),
        megadepth_depth,
        reading,
    )


def megadepth_depth(image_path: str, target: DepthTarget) -> np.ndarray:
    """Depth of the image at path `image_path`: [H, W] float32 up to scale, NaN = invalid."""
    folder, file = os.path.split(os.path.abspath(image_path))
    name = os.path.splitext(file)[0] + ".h5"
    depth = first_existing([os.path.join(os.path.dirname(folder), "depths", name)], image_path)
    return read_depth(depth, target, no_negatives=True)


def _in_imgs(root: str, file: str) -> bool:
    return os.path.basename(os.path.dirname(os.path.abspath(os.path.join(root, file)))) == "imgs"
