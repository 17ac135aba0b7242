"""`rgbd:PATH`: images with depth, in the layouts that RGB-D data sets have.

One's own data is NAME.jpg with NAME_depth.png (16 bit, millimetres, 0 = invalid), NAME_depth.npy or
another kind of `depth_files` (metres) beside it, and perhaps with NAME_depth_mask.npy or .png
(non-zero = valid). `layouts` knows the files of other data sets, `frames` those of NYU Depth v2 in
HDF5; PATH may be one such file.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget, read_depth
from spatial_ssrl_jax.data.sources.files import (
    FileSource,
    is_image,
    left_out,
    list_files,
    require_images,
    unreadable,
)
from spatial_ssrl_jax.data.sources.frames import ENDINGS, FrameSource, open_frames
from spatial_ssrl_jax.data.sources.layouts import OWN, Pair, find_pairs
from spatial_ssrl_jax.data.sources.listing import Listing

LAYOUT = (
    "NAME.jpg with NAME_depth.png, .npy, .npz, .h5, .pfm, .tif or .exr beside it, or the files of "
    "TUM RGB-D, ScanNet, 7-Scenes, SUN RGB-D, Hypersim, KITTI depth, ARKitScenes or NYU Depth v2"
)

_OWN_DEPTH = re.compile(r"_depth(?:_mask)?\.(?:png|tiff?)$", re.IGNORECASE)


@dataclass(frozen=True)
class PairedDepth:
    """Depth of images by a table of pairs; can be pickled.

    Attributes:
      root: the pairs' paths are relative to this folder.
      pairs: by the whole path of the image.
    """

    root: str
    pairs: Mapping[str, Pair]

    def __call__(self, image_path: str, target: DepthTarget) -> np.ndarray:
        """Depth of an image: [H, W] float32, NaN = invalid; raises `BadImage`."""
        pair = self.pairs.get(image_path)
        if pair is None:
            stem = os.path.splitext(os.path.basename(image_path))[0]
            raise BadImage(
                f"{image_path}: has no depth; expected {stem}_depth.png or another kind of depth "
                "file beside it."
            )
        mask = pair.mask and os.path.join(self.root, pair.mask)
        path = os.path.join(self.root, pair.depth)
        return read_depth(path, target, mask, decode=pair.decode)


def open_rgbd(spec: str, path: str, reading: Reading = READING) -> FileSource | FrameSource:
    """Pairs the images below `path`; raises `UserError` if none of them has depth.

    In the layout of one's own data, an image without depth stays listed and raises `BadImage` when
    it is read, so that it is counted and named. In the others it is left out, and noted, as are
    depth maps without an image, and frames in HDF5 files beside other images.
    """
    file = os.path.expanduser(path)
    if file.lower().endswith(ENDINGS) and os.path.isfile(file):
        root, files = os.path.dirname(file) or ".", [os.path.basename(file)]
    else:
        root, files = list_files(spec, path, LAYOUT)
    found = find_pairs(Listing(root, files))
    pairs = [pair for of_layout in found.values() for pair in of_layout]
    used = {file for pair in pairs for file in (pair.image, pair.depth, pair.mask)}
    rest = [file for file in files if is_image(file) and file not in used]
    notes = unreadable(files)
    frames = open_frames(spec, root, [file for file in files if file not in used], reading)
    if not pairs:
        return frames or _refuse(spec, root, rest, (*notes, *_without_frames(files)))
    if frames:
        notes += left_out(frames.files, "HDF5 files of frames beside images")
    images = [pair.image for pair in pairs]
    if list(found) == [OWN]:
        maps = [file for file in rest if _OWN_DEPTH.search(file)]
        notes += left_out(maps, "depth maps and masks without an image")
        images += sorted(set(rest).difference(maps))
    else:
        notes += left_out(_photos(rest), "images without depth")
    table = {os.path.join(root, pair.image): pair for pair in pairs}
    depths = tuple(pair.depth for pair in pairs)
    return FileSource(
        spec, root, tuple(sorted(images)), PairedDepth(root, table), reading, notes, depths
    )


def _photos(images: list[str]) -> list[str]:
    """Images that are not in files or folders of depth."""
    return [image for image in images if "depth" not in image.lower()]


def _without_frames(files: list[str]) -> tuple[str, ...]:
    found = [file for file in files if file.lower().endswith(ENDINGS)]
    return left_out(found, "HDF5 files without frames (images and depths, or rgb and depth)")


def _refuse(spec: str, root: str, images: list[str], notes: tuple[str, ...]) -> NoReturn:
    require_images(spec, root, images, LAYOUT, notes)
    images = _photos(images) or images
    first, count = images[0], f"{len(images):,} image{'s' if len(images) > 1 else ''}"
    lacks = f"{first} has no {os.path.splitext(first)[0]}_depth.png"
    what = "; ".join([f"{count} below {root}, none with depth: for example {lacks}", *notes])
    raise UserError(f"source '{spec}': {what}; expected {LAYOUT}.")
