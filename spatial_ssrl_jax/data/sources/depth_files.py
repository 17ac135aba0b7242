"""The files that hold depth, or a mask of it: from any of them one plane of numbers.

`.png .tif .tiff` (grey, 16 bit in millimetres, or a TIFF of floats), `.npy .npz .pfm .exr`, and
`.h5 .hdf5`. A file's header is checked before its values are read.
"""

import os
import re
import zipfile
from collections.abc import Callable, Iterable
from typing import IO, TypeVar

import numpy as np

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.retry import with_retries
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.data.images import check_pixels, open_header
from spatial_ssrl_jax.data.sources.hdf5 import check_stored, data_sets, open_hdf5

Value = TypeVar("Value")

IMAGE_ENDINGS = (".png", ".tif", ".tiff")  # whose integers are millimetres
_NUMBERS = ("I", "F")  # Pillow's modes of 16 or 32 bits begin so
_SMALL_NUMBERS = (*_NUMBERS, "1", "L")
_MILLIMETRES = 1e-3
_EXR_CHANNELS = ("Z", "depth", "Y", "R")  # Blender's and others' names of depth; grey; of RGB one
_PFM_HEADER = re.compile(rb"Pf\s+(\d+)\s+(\d+)\s+([-+.\deE]+)\s")
_PFM_HEADER_BYTES = 200  # at most


def read_values(path: str) -> np.ndarray:
    """The values of one depth file as they are stored: [H, W], any real type.

    A file that is unavailable is retried.

    Raises:
      BadImage: the file is missing, cannot be read, has more than `SOURCE_PIXELS` pixels, keeps its
        values in other files, or holds no plane of numbers.
      UserError: its folder stays unavailable.
    """
    return plane(guarded(lambda: _reader(path)(path), path))


def read_mask_values(path: str) -> np.ndarray:
    """`read_values` of a mask, whose image may have 1 or 8 bits a pixel as well."""
    if path.lower().endswith(IMAGE_ENDINGS):
        return plane(guarded(lambda: _read_image(path, _SMALL_NUMBERS), path))
    return read_values(path)


def to_metres(values: np.ndarray, path: str) -> np.ndarray:
    """[H, W] float32 of a file's values: an image of integers is in millimetres, others as is."""
    if path.lower().endswith(IMAGE_ENDINGS) and values.dtype.kind in "iu":
        return values.astype(np.float32) * np.float32(_MILLIMETRES)
    return values.astype(np.float32, copy=False)


def guarded(read: Callable[[], Value], path: str) -> Value:
    """Calls a reader of a listed file, with retries; any error becomes a `BadImage`."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadImage(f"{path}: is no file; give one with depth.")  # a pipe would hang
    try:
        return with_retries(read, path)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise BadImage(f"{path}: there is no such file.") from error
    except Exception as error:  # readers raise nearly anything on a damaged file
        raise BadImage(f"{path}: cannot be read as depth ({error_line(error)}).") from error


def check_plane(shape: tuple[int, ...], dtype: np.dtype, path: str) -> None:
    """Raises `BadImage` for what is no plane of numbers, or is too large, before it is read."""
    is_plane = len(shape) == 2 or (len(shape) == 3 and 1 in (shape[0], shape[2]))
    if not is_plane or min(shape) < 1 or dtype.kind not in "fiub":
        what = f"{dtype} {list(shape)}"
        raise BadImage(f"{path}: holds {what}; expected numbers [H, W] or [H, W, 1].")
    check_pixels(shape, path)


def plane(values: np.ndarray) -> np.ndarray:
    """[H, W], [H, W, 1] or [1, H, W] -> [H, W]."""
    if values.ndim == 3:
        return values[..., 0] if values.shape[2] == 1 else values[0]
    return values


def _reader(path: str) -> Callable[[str], np.ndarray]:
    return _READERS.get(os.path.splitext(path)[1].lower(), _read_npy)


def _read_image(path: str, modes: tuple[str, ...] = _NUMBERS) -> np.ndarray:
    with open_header(path, path) as image:
        if not image.mode.startswith(modes):
            raise BadImage(f"{path}: is {image.mode}, not 16-bit grey in millimetres.")
        check_pixels(image.size, path)
        return np.asarray(image)


def _read_npy(path: str) -> np.ndarray:
    with open(path, "rb") as file:
        _check_npy(file, path)
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_npy(file: IO[bytes], path: str) -> None:
    format = np.lib.format
    old = format.read_magic(file) == (1, 0)
    header = format.read_array_header_1_0 if old else format.read_array_header_2_0
    shape, _, dtype = header(file)
    check_plane(shape, dtype, path)


def _read_npz(path: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy"): name for name in archive.namelist()}
        name = names[_choose(names, ("depth",), path, "array")]
        with archive.open(name) as file:
            _check_npy(file, path)
        with archive.open(name) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def _read_hdf5(path: str) -> np.ndarray:
    with open_hdf5(path) as file:
        found = data_sets(file, "depth")
        values = found[_choose(found, ("depth",), path, "data set")]
        check_stored(values, path)
        check_plane(values.shape or (), values.dtype, path)
        return values[()]


def _read_pfm(path: str) -> np.ndarray:
    """Portable float map: rows from the last to the first; a scale below 0 means little-endian."""
    with open(path, "rb") as file:
        header = _PFM_HEADER.match(file.read(_PFM_HEADER_BYTES))
        if header is None:
            raise BadImage(f"{path}: is no PFM of one channel; expected 'Pf' at its start.")
        width, height, scale = int(header[1]), int(header[2]), float(header[3])
        dtype = np.dtype("<f4" if scale < 0 else ">f4")
        check_plane((height, width), dtype, path)
        file.seek(header.end())
        values = np.frombuffer(file.read(4 * width * height), dtype)
    return values.reshape(height, width)[::-1]


def _read_exr(path: str) -> np.ndarray:
    try:
        import OpenEXR  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise UserError(
            f"{path}: reading OpenEXR needs a library: pip install 'spatial_ssrl_jax[exr]'."
        ) from error
    with open(path, "rb"):  # for the system's error, which OpenEXR does not tell
        header = OpenEXR.File(path, header_only=True).header()
    (left, top), (right, bottom) = window = [side.tolist() for side in header["dataWindow"]]
    check_plane((bottom - top + 1, right - left + 1), np.dtype(np.float32), path)
    if window != [side.tolist() for side in header["displayWindow"]]:
        raise BadImage(f"{path}: holds a part of its picture; save all of it.")
    channels = OpenEXR.File(path, separate_channels=True).channels()
    return channels[_choose(channels, _EXR_CHANNELS, path, "channel")].pixels


_READERS = {
    **dict.fromkeys(IMAGE_ENDINGS, _read_image),
    **dict.fromkeys((".h5", ".hdf5"), _read_hdf5),
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pfm": _read_pfm,
    ".exr": _read_exr,
}
DEPTH_ENDINGS = tuple(_READERS)


def _choose(names: Iterable[str], known: tuple[str, ...], path: str, what: str) -> str:
    """The name of depth: a known one, else the only one."""
    names = list(names)
    for name in known:
        if name in names:
            return name
    if len(names) != 1:
        holds = f"several ({', '.join(sorted(names)[:5])})" if names else "none"
        raise BadImage(f"{path}: expected one {what} named '{known[0]}'; it holds {holds}.")
    return names[0]
