"""The files that hold depth, a mask of it, or both: from any of them one plane of numbers."""

import math
import os
from typing import Any

import h5py
import numpy as np
from h5py import h5l  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.retry import with_retries
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.data.images import SOURCE_PIXELS, open_header

_MILLIMETRES = 1e-3


def read_values(path: str) -> np.ndarray:
    """The values of one file as they are stored: [H, W], any real type.

    A file that is unavailable is retried.

    Raises:
      BadImage: the file is missing, cannot be read, has more than `SOURCE_PIXELS` pixels, keeps its
        values in other files, or holds no plane of numbers.
      UserError: its folder stays unavailable.
    """
    ending = os.path.splitext(path)[1]
    read = {".png": _read_png, ".h5": _read_h5}.get(ending, _read_npy)
    try:
        values = with_retries(lambda: read(path), path)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise BadImage(f"{path}: there is no such file.") from error
    except Exception as error:  # readers raise nearly anything on a damaged file
        raise BadImage(f"{path}: cannot be read as depth ({error_line(error)}).") from error
    if values.ndim == 3:
        values = values[..., 0] if values.shape[2] == 1 else values[0]
    return values


def to_metres(values: np.ndarray, path: str) -> np.ndarray:
    """[H, W] float32 of a file's values: an image of integers is in millimetres, others as is."""
    if path.endswith(".png"):
        return values.astype(np.float32) * np.float32(_MILLIMETRES)
    return values.astype(np.float32)


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
        return np.asarray(image)


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
