"""Depth of every kind, as one format: float32 at the image's size, NaN = invalid."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.common.errors import BadImage
from spatial_ssrl_jax.common.reading import READING, DepthValues, Reading
from spatial_ssrl_jax.data.images import SIDEWAYS, upright
from spatial_ssrl_jax.data.sources.depth_files import read_mask_values, read_values, to_metres

MAX_ASPECT_ERROR = 0.02  # of width/height, between an image and its depth
_LEAST = np.finfo(np.float32).tiny  # so that the inverse is finite too


@dataclass(frozen=True)
class DepthTarget:
    """What a depth map is fitted to: an image, and how its source reads depth.

    Attributes:
      size: (height, width) of the image as it is displayed.
      orientation: the EXIF orientation, 1 to 8, that it was turned by.
      reading: of the source.
    """

    size: tuple[int, int]
    orientation: int = 1
    reading: Reading = READING


def read_depth(
    path: str,
    target: DepthTarget,
    mask_path: str | None = None,
    *,
    decode: Callable[[np.ndarray], np.ndarray] | None = None,
    no_negatives: bool = False,
) -> np.ndarray:
    """Reads one depth file and fits it to its image.

    An image of integers is in millimetres; other files are taken as they are: metres, or up to
    scale. Invalid is a value that is not finite or not above 0, and of integers the largest of
    their type: nothing was measured, as in 7-Scenes, or nothing as far, as Virtual KITTI's sky; no
    depth camera sees as far as 65.535 m.

    Args:
      path: the depth file.
      target: what it is fitted to.
      mask_path: a file of the depth's own shape, an image too, non-zero where it is valid.
      decode: the stored values -> [H, W] float32, where a layout has a unit or code of its own.
      no_negatives: whether a value below 0 means that the file holds no depth (MegaDepth).

    Returns:
      [H, W] float32, larger is farther, NaN where invalid; turned as its image is, and resampled to
      the nearest pixel.

    Raises:
      BadImage: a file is missing, cannot be read, has more than `SOURCE_PIXELS` pixels, keeps its
        values in other files, has another shape than its image or no valid pixel; or whether it is
        turned as its image is cannot be told.
    """
    values = read_values(path)
    valid = below_limit(values)
    if mask_path is not None:
        valid = valid & _read_mask(mask_path, values.shape)
    depth = to_metres(values, path) if decode is None else decode(values)
    return fit_depth(depth, target, path, valid, no_negatives=no_negatives)


def below_limit(values: np.ndarray) -> np.ndarray:
    """Where values [H, W] are not the largest of their integer type, which is no depth: [H, W]."""
    if values.dtype.kind not in "iu":
        return np.ones(values.shape, bool)
    return values != np.iinfo(values.dtype).max


def fit_depth(
    depth: np.ndarray,
    target: DepthTarget,
    name: str,
    mask: np.ndarray | None = None,
    *,
    no_negatives: bool = False,
) -> np.ndarray:
    """Depth [H, W] float32, from wherever, as `read_depth` returns it; `name` is for errors."""
    if no_negatives and (depth < 0).any():
        raise BadImage(f"{name}: has negative values, so it holds an ordinal map and no depth.")
    valid = np.isfinite(depth) & (depth >= _LEAST)
    if mask is not None:
        valid &= mask
    if not valid.any():
        raise BadImage(f"{name}: has no pixel with a valid depth.")
    depth = _increasing(np.where(valid, depth, np.float32(np.nan)), target.reading.depth)
    return _resample(_displayed(depth, target, name), target.size, name)


def first_existing(paths: Sequence[str], image_path: str) -> str:
    """The first path that exists; raises `BadImage` naming the image and what it lacks."""
    for path in paths:
        if os.path.isfile(path):
            return path
    wanted = " or ".join(os.path.basename(path) for path in paths)
    raise BadImage(f"{image_path}: has no depth; expected {wanted} in {os.path.dirname(paths[0])}.")


def _read_mask(path: str, shape: tuple[int, ...]) -> np.ndarray:
    mask = read_mask_values(path)
    if mask.shape != shape:
        raise BadImage(f"{path}: is {mask.shape}, but the depth it masks is {shape}.")
    return np.isfinite(mask) & (mask != 0)


def _increasing(depth: np.ndarray, values: DepthValues) -> np.ndarray:
    """Valid values above 0 of any kind as values above 0 that grow with the distance."""
    if values == "inverse":
        return 1 / depth
    if values == "relative-inverse":
        # Even in the stored values, as their error is: in 1/x it is large where x is small.
        return 2 * np.nanmax(depth) - depth
    return depth


def _displayed(depth: np.ndarray, target: DepthTarget, name: str) -> np.ndarray:
    """Depth turned as its image is displayed, unless it is turned already."""
    orientation, size = target.orientation, target.size
    if orientation == 1:
        return depth
    stored = size[::-1] if orientation in SIDEWAYS else size
    pictures = {"stored": stored, "displayed": size}
    fits = [which for which, picture in pictures.items() if depth.shape == picture]
    fits = fits or [w for w, picture in pictures.items() if _same_aspect(depth.shape, picture)]
    if len(fits) > 1:
        fits = [which for which in fits if which == target.reading.exif]
        if not fits:
            raise BadImage(
                f"{name}: its image is turned by EXIF orientation {orientation}, and whether this "
                "depth is turned too cannot be told from its shape: end the source's SPEC with "
                ",exif=stored if it is not, with ,exif=displayed if it is."
            )
    return upright(depth, orientation) if fits == ["stored"] else depth


def _same_aspect(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    (rows, cols), (height, width) = shape, size
    return abs(cols * height / (rows * width) - 1) <= MAX_ASPECT_ERROR


def _resample(depth: np.ndarray, size: tuple[int, int], path: str) -> np.ndarray:
    """Nearest-pixel resampling: the depth pixel that holds the centre of each image pixel."""
    if depth.shape == size:
        return depth
    (height, width), (rows, cols) = size, depth.shape
    if not _same_aspect(depth.shape, size):
        raise BadImage(
            f"{path}: its shape, {cols}x{rows}, is not that of its image, {width}x{height}."
        )
    row = (2 * np.arange(height) + 1) * rows // (2 * height)
    col = (2 * np.arange(width) + 1) * cols // (2 * width)
    resampled = depth[row[:, None], col[None, :]]
    if np.isnan(resampled).all():
        raise BadImage(f"{path}: has no valid depth left at {width}x{height}.")
    return resampled
