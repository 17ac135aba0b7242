"""Depth files of every kind, read as one format: float32 at the image's size, NaN = invalid."""

import math
import os
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
from h5py import h5l  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.retry import with_retries
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.data.images import SOURCE_PIXELS, open_header

MAX_ASPECT_ERROR = 0.02  # of width/height, between an image and its depth
_MILLIMETRES = 1e-3


def read_depth(
    path: str, size: tuple[int, int], mask_path: str | None = None, *, no_negatives: bool = False
) -> np.ndarray:
    """Reads one depth file and fits it to its image.

    `.png` is 16 bit in millimetres; `.npy` and `.h5` (data set `depth`, else the first) are taken
    as they are: metres, or up to scale. A value that is not finite or not above 0 is invalid.

    Args:
      path: the depth file.
      size: (height, width) of the image.
      mask_path: a `.npy` of the depth's own shape, non-zero where it is valid.
      no_negatives: whether a value below 0 means that the file holds no depth (MegaDepth).

    Returns:
      [H, W] float32, NaN where invalid, resampled to the nearest pixel.

    Raises:
      BadImage: a file is missing, cannot be read, has more than `SOURCE_PIXELS` pixels, keeps its
        values in other files, has another shape than its image or no valid pixel.
    """
    depth = _plane(_read(path))
    if no_negatives and (depth < 0).any():
        raise BadImage(f"{path}: has negative values, so it holds an ordinal map and no depth.")
    valid = np.isfinite(depth) & (depth > 0)
    if mask_path is not None:
        valid &= _read_mask(mask_path, depth.shape)
    if not valid.any():
        raise BadImage(f"{path}: has no pixel with a valid depth.")
    return _resample(np.where(valid, depth, np.float32(np.nan)), size, path)


def first_existing(paths: Sequence[str], image_path: str) -> str:
    """The first path that exists; raises `BadImage` naming the image and what it lacks."""
    for path in paths:
        if os.path.isfile(path):
            return path
    wanted = " or ".join(os.path.basename(path) for path in paths)
    raise BadImage(f"{image_path}: has no depth; expected {wanted} in {os.path.dirname(paths[0])}.")


def _read(path: str) -> np.ndarray:
    """The values of one file, any shape; PNG scaled to metres. Retries an unavailable file."""
    ending = os.path.splitext(path)[1]
    read = {".png": _read_png, ".h5": _read_h5}.get(ending, _read_npy)
    try:
        return with_retries(lambda: read(path), path)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise BadImage(f"{path}: there is no such file.") from error
    except Exception as error:  # readers raise nearly anything on a damaged file
        raise BadImage(f"{path}: cannot be read as depth ({error_line(error)}).") from error


def _read_npy(path: str) -> np.ndarray:
    with open(path, "rb") as file:
        format = np.lib.format
        old = format.read_magic(file) == (1, 0)
        header = format.read_array_header_1_0 if old else format.read_array_header_2_0
        shape, _, dtype = header(file)
        _check_header(shape, dtype, path)
        file.seek(0)
        return format.read_array(file, allow_pickle=False)


def _read_png(path: str) -> np.ndarray:
    with open_header(path, path) as image:
        if not image.mode.startswith("I"):
            raise BadImage(f"{path}: is {image.mode}, not 16-bit grey in millimetres.")
        _check_pixels(image.size, path)
        return np.asarray(image).astype(np.float32) * np.float32(_MILLIMETRES)


def _read_h5(path: str) -> np.ndarray:
    with h5py.File(path, "r") as file:
        # Before any object is opened: opening a link into another file would read that file.
        if file.id.links.visit(_leaves_file, info=True):
            raise BadImage(f"{path}: has a link to another file; copy its depth into this one.")
        names = sorted(file, key="depth".__ne__)  # it comes first
        items = (file[name] for name in names)
        values = next((item for item in items if isinstance(item, h5py.Dataset)), None)
        if values is None:
            raise BadImage(f"{path}: holds no data set; expected one named 'depth'.")
        if values.is_virtual or values.external:
            raise BadImage(f"{path}: keeps its values in other files; copy them into this one.")
        _check_header(values.shape or (), values.dtype, path)
        _check_pixels(values.chunks or (), path)  # a chunk is read whole
        return values[()]


def _leaves_file(name: bytes, link: Any) -> bool | None:
    """Whether a link points out of its file; None, which goes on to the next, where it does not."""
    return link.type not in (h5l.TYPE_HARD, h5l.TYPE_SOFT) or None


def _check_header(shape: tuple[int, ...], dtype: np.dtype, path: str) -> None:
    """Raises `BadImage` for what is no plane of numbers, or is too large, before it is read."""
    is_plane = len(shape) == 2 or (len(shape) == 3 and 1 in (shape[0], shape[2]))
    if not is_plane or min(shape) < 1 or dtype.kind not in "fiub":
        what = f"{dtype} {list(shape)}"
        raise BadImage(f"{path}: holds {what}; expected numbers [H, W] or [H, W, 1].")
    _check_pixels(shape, path)


def _check_pixels(shape: tuple[int, ...], path: str) -> None:
    if math.prod(shape) > SOURCE_PIXELS:
        size = "x".join(map(str, shape))
        raise BadImage(f"{path}: {size} is more than {SOURCE_PIXELS:,} pixels; shrink it first.")


def _plane(values: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, 1] or [1, H, W] of any real type -> [H, W] float32."""
    if values.ndim == 3:
        values = values[..., 0] if values.shape[2] == 1 else values[0]
    return values.astype(np.float32)


def _read_mask(path: str, shape: tuple[int, int]) -> np.ndarray:
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadImage(f"{path}: is no file; give one with a mask.")  # a pipe would hang
    mask = _plane(_read(path))
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
