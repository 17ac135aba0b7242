"""Depth of every kind, as one format: float32 at the image's size, NaN = invalid."""

import os
from collections.abc import Callable, Sequence

import numpy as np

from spatial_ssrl_jax.common.errors import BadImage
from spatial_ssrl_jax.data.sources.depth_files import read_values, to_metres

MAX_ASPECT_ERROR = 0.02  # of width/height, between an image and its depth


def read_depth(
    path: str,
    size: tuple[int, int],
    mask_path: str | None = None,
    *,
    decode: Callable[[np.ndarray], np.ndarray] | None = None,
    no_negatives: bool = False,
) -> np.ndarray:
    """Reads one depth file and fits it to its image.

    `.png` is 16 bit in millimetres; `.npy` and `.h5` (data set `depth`, else the first) are taken
    as they are: metres, or up to scale. A value that is not finite or not above 0 is invalid.

    Args:
      path: the depth file.
      size: (height, width) of the image.
      mask_path: a `.npy` of the depth's own shape, non-zero where it is valid.
      decode: the stored values -> [H, W] float32, where a layout has a unit or code of its own.
      no_negatives: whether a value below 0 means that the file holds no depth (MegaDepth).

    Returns:
      [H, W] float32, NaN where invalid, resampled to the nearest pixel.

    Raises:
      BadImage: a file is missing, cannot be read, has more than `SOURCE_PIXELS` pixels, keeps its
        values in other files, has another shape than its image or no valid pixel.
    """
    values = read_values(path)
    mask = None if mask_path is None else _read_mask(mask_path, values.shape)
    depth = to_metres(values, path) if decode is None else decode(values)
    return fit_depth(depth, size, path, mask, no_negatives=no_negatives)


def fit_depth(
    depth: np.ndarray,
    size: tuple[int, int],
    name: str,
    mask: np.ndarray | None = None,
    *,
    no_negatives: bool = False,
) -> np.ndarray:
    """Depth [H, W] float32, from wherever, as `read_depth` returns it; `name` is for errors."""
    if no_negatives and (depth < 0).any():
        raise BadImage(f"{name}: has negative values, so it holds an ordinal map and no depth.")
    valid = np.isfinite(depth) & (depth > 0)
    if mask is not None:
        valid &= mask
    if not valid.any():
        raise BadImage(f"{name}: has no pixel with a valid depth.")
    return _resample(np.where(valid, depth, np.float32(np.nan)), size, name)


def first_existing(paths: Sequence[str], image_path: str) -> str:
    """The first path that exists; raises `BadImage` naming the image and what it lacks."""
    for path in paths:
        if os.path.isfile(path):
            return path
    wanted = " or ".join(os.path.basename(path) for path in paths)
    raise BadImage(f"{image_path}: has no depth; expected {wanted} in {os.path.dirname(paths[0])}.")


def _read_mask(path: str, shape: tuple[int, ...]) -> np.ndarray:
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadImage(f"{path}: is no file; give one with a mask.")  # a pipe would hang
    mask = read_values(path)
    if mask.shape != shape:
        raise BadImage(f"{path}: is {mask.shape}, but the depth it masks is {shape}.")
    return np.isfinite(mask) & (mask != 0)


def _resample(depth: np.ndarray, size: tuple[int, int], path: str) -> np.ndarray:
    """Nearest-pixel resampling: the depth pixel that holds the centre of each image pixel."""
    if depth.shape == size:
        return depth
    (height, width), (rows, cols) = size, depth.shape
    if abs(cols * height / (rows * width) - 1) > MAX_ASPECT_ERROR:
        raise BadImage(
            f"{path}: its shape, {cols}x{rows}, is not that of its image, {width}x{height}."
        )
    row = (2 * np.arange(height) + 1) * rows // (2 * height)
    col = (2 * np.arange(width) + 1) * cols // (2 * width)
    resampled = depth[row[:, None], col[None, :]]
    if np.isnan(resampled).all():
        raise BadImage(f"{path}: has no valid depth left at {width}x{height}.")
    return resampled
