"""Reading images: from any file an upright 8-bit RGB image, or a `BadImage`."""

import io
import os
import stat
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.retry import with_retries
from spatial_ssrl_jax.common.text import error_line

Value = TypeVar("Value")

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
SOURCE_PIXELS = 2**26  # of a source's image: many are open at a time, 200 MB each at this size
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # old Pillows open a 16-bit PNG as "I"
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def open_image(
    path_or_bytes: str | os.PathLike[str] | bytes, name: str = "", listed: bool = False
) -> np.ndarray:
    """Reads one image, turned upright by its EXIF orientation; of an animation the first frame.

    Alpha is dropped, never blended; 16-bit grey is scaled to 8 bits, not clipped.

    Args:
      path_or_bytes: a file, or an encoded image.
      name: names the image in errors; the path by default.
      listed: a source has listed the file: it is retried while its folder is unavailable.

    Returns:
      [H, W, 3] uint8, RGB, writable and contiguous.

    Raises:
      BadImage: the file is missing, no image, truncated, empty, or larger than `MAX_PIXELS`.
      UserError: its folder stays unavailable.
    """
    return _read(path_or_bytes, name or _name(path_or_bytes), listed, upright_rgb)


def open_source_image(path_or_bytes: str | os.PathLike[str] | bytes, name: str = "") -> np.ndarray:
    """`open_image` for a source: rejects more than `SOURCE_PIXELS` pixels before decoding."""
    name = name or _name(path_or_bytes)
    width, height = image_size(path_or_bytes, name, listed=True)
    if width * height > SOURCE_PIXELS:
        raise BadImage(
            f"{name}: {width}x{height} is more than {SOURCE_PIXELS:,} pixels; shrink it first."
        )
    return open_image(path_or_bytes, name, listed=True)


def image_size(
    path_or_bytes: str | os.PathLike[str] | bytes, name: str = "", listed: bool = False
) -> tuple[int, int]:
    """(width, height) in pixels of the image that `open_image` returns, from the header alone.

    Raises:
      BadImage: as `open_image`, except that damage after the header is not detected.
    """
    return _read(path_or_bytes, name or _name(path_or_bytes), listed, _upright_size)


def _read(
    path_or_bytes: str | os.PathLike[str] | bytes,
    name: str,
    listed: bool,
    convert: Callable[[Image.Image, str], Value],
) -> Value:
    """`convert` of the open image and its name; retries while the file is unavailable."""

    def read() -> Value:
        with _open(path_or_bytes, name) as image:
            return convert(image, name)

    try:
        if isinstance(path_or_bytes, bytes):
            return read()
        return with_retries(read, os.fspath(path_or_bytes), listed)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise BadImage(f"{name}: there is no such file.") from error
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise BadImage(_damaged(name, error)) from error


def _name(path_or_bytes: str | os.PathLike[str] | bytes) -> str:
    if isinstance(path_or_bytes, bytes):
        return f"an image of {len(path_or_bytes)} bytes"
    return os.fspath(path_or_bytes)


def _open(path_or_bytes: str | os.PathLike[str] | bytes, name: str) -> Image.Image:
    """Opens lazily: reads the header only, and rejects what should not be decoded."""
    if isinstance(path_or_bytes, bytes):
        file = io.BytesIO(path_or_bytes)
    else:
        file = path_or_bytes
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise BadImage(f"{name}: is no file; give one with an image.")  # a pipe would hang
    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:
        raise BadImage(f"{name}: not an image in a format that Pillow reads.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"{name}: larger than {MAX_PIXELS:,} pixels; shrink it first.") from error
    width, height = image.size
    if width * height > MAX_PIXELS or width * height == 0:
        image.close()
        problem = (
            "empty" if width * height == 0 else f"more than {MAX_PIXELS:,} pixels; shrink it first"
        )
        raise BadImage(f"{name}: {width}x{height} pixels is {problem}.")
    return image


def _upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    """(width, height) of an open image after its EXIF rotation."""
    # The base class's method: that of PNG decodes the whole image to find it.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    width, height = image.size
    return (height, width) if orientation in _SIDEWAYS else (width, height)


def upright_rgb(image: Image.Image, name: str) -> np.ndarray:
    """Decodes an open image, as `open_image` does.

    Raises:
      BadImage: it holds floating-point values; `name` is used in the message.
    """
    if image.mode == "F":
        raise BadImage(f"{name}: holds floating-point values, not an 8-bit or 16-bit image.")
    image.load()  # before the EXIF is read, which in a PNG may follow the pixels
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT:
        grey = np.asarray(image).astype(np.float32) / 257.0  # 65535 -> 255
        grey = np.rint(grey.clip(0, 255)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _damaged(name: str, error: Exception) -> str:
    return f"{name}: cannot be read as an image ({error_line(error)})."
