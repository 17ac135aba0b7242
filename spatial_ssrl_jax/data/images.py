"""Reading images: whatever a file holds, upright 8-bit RGB comes out, or a `BadImage`."""

import io
import os
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
    path_or_bytes: str | os.PathLike | bytes, name: str = "", listed: bool = False
) -> np.ndarray:
    """Reads one image, turned upright by its EXIF orientation; of an animation the first frame.

    Alpha is dropped, never blended; 16-bit grey is scaled to 8 bits, not clipped.

    Args:
      path_or_bytes: a file, or an encoded image.
      name: what errors call the image; the path unless given.
      listed: a source has seen the file, so that it is waited for when its folder is away.

    Returns:
      [H, W, 3] uint8, RGB, writable and contiguous.

    Raises:
      BadPicture: the file is missing, no image, cut short, empty, or larger than `MAX_PIXELS`.
      UserError: its folder was away for long.
    """
    return _use(path_or_bytes, name or _name(path_or_bytes), listed, _upright_rgb)


def open_picture(path_or_bytes: str | os.PathLike | bytes, name: str = "") -> np.ndarray:
    """`open_image` for a source: refuses more than `SOURCE_PIXELS` before it decodes anything."""
    name = name or _name(path_or_bytes)
    width, height = image_size(path_or_bytes, name, listed=True)
    if width * height > SOURCE_PIXELS:
        raise BadImage(
            f"{name}: {width}x{height} is more than {SOURCE_PIXELS:,} pixels; shrink it first."
        )
    return open_image(path_or_bytes, name, listed=True)


def image_size(
    path_or_bytes: str | os.PathLike | bytes, name: str = "", listed: bool = False
) -> tuple[int, int]:
    """The (width, height) that `open_image` would give, from the header alone.

    Raises:
      BadPicture: as `open_image`, save that damage after the header is not noticed.
    """
    return _use(path_or_bytes, name or _name(path_or_bytes), listed, _upright_size)


def _use(
    path_or_bytes: str | os.PathLike | bytes,
    name: str,
    listed: bool,
    use: Callable[[Image.Image, str], Value],
) -> Value:
    """What `use` makes of the open image and its name; waits for a file that is away."""

    def read() -> Value:
        with _open(path_or_bytes, name) as picture:
            return use(picture, name)

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


def _name(path_or_bytes: str | os.PathLike | bytes) -> str:
    is_bytes = isinstance(path_or_bytes, bytes)
    return f"an image of {len(path_or_bytes)} bytes" if is_bytes else os.fspath(path_or_bytes)


def _open(path_or_bytes: str | os.PathLike | bytes, name: str) -> Image.Image:
    """Opens lazily: reads the header only, and refuses what should not be decoded."""
    is_bytes = isinstance(path_or_bytes, bytes)
    try:
        picture = Image.open(io.BytesIO(path_or_bytes) if is_bytes else path_or_bytes)
    except UnidentifiedImageError as error:
        raise BadImage(f"{name}: not an image in a format that Pillow reads.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"{name}: larger than {MAX_PIXELS:,} pixels; shrink it first.") from error
    width, height = picture.size
    if width * height > MAX_PIXELS or width * height == 0:
        picture.close()
        what = (
            "empty" if width * height == 0 else f"more than {MAX_PIXELS:,} pixels; shrink it first"
        )
        raise BadImage(f"{name}: {width}x{height} pixels is {what}.")
    return picture


def _upright_size(picture: Image.Image, name: str) -> tuple[int, int]:
    """(width, height) of an open image as it is looked at."""
    # The base class's method: that of PNG decodes the whole image to look after it.
    orientation = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)
    width, height = picture.size
    return (height, width) if orientation in _SIDEWAYS else (width, height)


def _upright_rgb(picture: Image.Image, name: str) -> np.ndarray:
    """Decodes an open image to [H, W, 3] uint8."""
    if picture.mode == "F":
        raise BadImage(f"{name}: holds floating-point values, not an image to look at.")
    picture.load()  # before the EXIF is asked for, which in a PNG may stand after the pixels
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in _SIXTEEN_BIT:
        grey = np.asarray(picture).astype(np.float32) / 257.0  # 65535 -> 255
        grey = np.rint(grey.clip(0, 255)).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(picture.convert("RGB"))


def _damaged(name: str, error: Exception) -> str:
    return f"{name}: cannot be read as an image ({error_line(error)})."
