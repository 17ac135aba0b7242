"""Reading images: from any file an upright 8-bit RGB image, or a `BadImage`."""

import io
import math
import os
import stat
from collections.abc import Callable
from functools import cache, partial
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.reading import Transparency
from spatial_ssrl_jax.common.retry import with_retries
from spatial_ssrl_jax.common.text import error_line

Value = TypeVar("Value")

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
SOURCE_PIXELS = 2**26  # of a source's image: many are open at a time, 200 MB each at this size
HEIF_EXTRA = "spatial_ssrl_jax[heif]"
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # old Pillows open a 16-bit PNG as "I"
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_UPSIDE_DOWN, _MIRRORED = (3, 4, 7, 8), (2, 3, 6, 7)  # that reverse rows and columns after that
# A PNG's transparent colour has the file's depth, and Pillow's pixels have 8 bits.
_KEY_SCALE = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}


def open_image(
    path_or_bytes: str | os.PathLike[str] | bytes,
    name: str = "",
    listed: bool = False,
    transparency: Transparency = "white",
) -> np.ndarray:
    """Reads one image, turned upright by its EXIF orientation; of an animation the first frame.

    16-bit grey is scaled to 8 bits, not clipped.

    Args:
      path_or_bytes: a file, or an encoded image.
      name: names the image in errors; the path by default.
      listed: a source has listed the file: it is retried while its folder is unavailable.
      transparency: see `Reading`.

    Returns:
      [H, W, 3] uint8, RGB, writable and contiguous.

    Raises:
      BadImage: the file is missing, no image, truncated, empty, or larger than `MAX_PIXELS`.
      UserError: its folder stays unavailable.
    """
    convert = partial(upright_rgb, transparency=transparency)
    return _read(path_or_bytes, name or _name(path_or_bytes), listed, convert)


def open_source_image(
    path_or_bytes: str | os.PathLike[str] | bytes,
    name: str = "",
    transparency: Transparency = "white",
    listed: bool = True,
) -> np.ndarray:
    """`open_image` for a source: rejects more than `SOURCE_PIXELS` pixels before decoding."""
    return open_oriented_image(path_or_bytes, name, transparency, listed)[0]


def open_oriented_image(
    path_or_bytes: str | os.PathLike[str] | bytes,
    name: str = "",
    transparency: Transparency = "white",
    listed: bool = True,
) -> tuple[np.ndarray, int]:
    """`open_source_image`, and the EXIF orientation, 1 to 8, that the image was turned by."""

    def convert(image: Image.Image, name: str) -> tuple[np.ndarray, int]:
        check_pixels(image.size, name)
        pixels = upright_rgb(image, name, transparency)
        return pixels, _orientation(image.getexif())

    return _read(path_or_bytes, name or _name(path_or_bytes), listed, convert)


def check_pixels(size: tuple[int, ...], name: str) -> None:
    """Raises `BadImage` for sides, of an image or an array, of more than `SOURCE_PIXELS` pixels."""
    if math.prod(size) > SOURCE_PIXELS:
        sides = "x".join(map(str, size))
        raise BadImage(f"{name}: {sides} is more than {SOURCE_PIXELS:,} pixels; shrink it first.")


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
        with open_header(path_or_bytes, name) as image:
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


def open_header(path_or_bytes: str | os.PathLike[str] | bytes, name: str) -> Image.Image:
    """Opens an image and reads its header only.

    Raises:
      BadImage: it is no image or no file, is empty, or is larger than `MAX_PIXELS`.
      OSError: it cannot be read.
    """
    if isinstance(path_or_bytes, bytes):
        file = io.BytesIO(path_or_bytes)
    else:
        file = path_or_bytes
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise BadImage(f"{name}: is no file; give one with an image.")  # a pipe would hang
    try:
        image = _open(file)
    except UnidentifiedImageError as error:
        is_heif = name.lower().endswith((".heic", ".heif")) and not reads_heif()
        more = f"; HEIF needs pip install '{HEIF_EXTRA}'" if is_heif else ""
        raise BadImage(f"{name}: not an image in a format that Pillow reads{more}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"{name}: larger than {MAX_PIXELS:,} pixels; shrink it first.") from error
    if image.format == "EPS":  # a program, which Pillow lets Ghostscript run
        image.close()
        raise BadImage(f"{name}: is PostScript, which is not read; save it as PNG.")
    width, height = image.size
    if width * height > MAX_PIXELS or width * height == 0:
        image.close()
        problem = (
            "empty" if width * height == 0 else f"more than {MAX_PIXELS:,} pixels; shrink it first"
        )
        raise BadImage(f"{name}: {width}x{height} pixels is {problem}.")
    return image


def _open(file: str | os.PathLike[str] | io.BytesIO) -> Image.Image:
    """Pillow's `open`, with HEIF where its library is installed."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if not reads_heif():
            raise
        return Image.open(file)


@cache
def reads_heif() -> bool:
    """Whether Pillow reads HEIF here; it does by a library, which this lets it know."""
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    register_heif_opener()
    return True


def _upright_size(image: Image.Image, name: str) -> tuple[int, int]:
    """(width, height) of an open image after its EXIF rotation."""
    # The base class's method: that of PNG decodes the whole image to find it.
    orientation = _orientation(Image.Image.getexif(image))
    width, height = image.size
    return (height, width) if orientation in SIDEWAYS else (width, height)


def _orientation(exif: Image.Exif) -> int:
    """The EXIF orientation, 1 to 8; Pillow ignores any other value, as 1."""
    found = exif.get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Values [H, W, …] of a picture as it is stored, turned by its EXIF orientation, as it is."""
    if orientation in SIDEWAYS:
        values = values.swapaxes(0, 1)
    if orientation in _UPSIDE_DOWN:
        values = values[::-1]
    if orientation in _MIRRORED:
        values = values[:, ::-1]
    return np.ascontiguousarray(values)


def upright_rgb(image: Image.Image, name: str, transparency: Transparency = "white") -> np.ndarray:
    """Decodes an open image, as `open_image` does.

    Raises:
      BadImage: it holds floating-point values; `name` is used in the message.
    """
    if image.mode == "F":
        raise BadImage(f"{name}: holds floating-point values, not an 8-bit or 16-bit image.")
    key = _transparent_colour(image)
    image.load()  # before the EXIF is read, which in a PNG may follow the pixels
    if _orientation(image.getexif()) != 1:  # else it would be copied
        image = ImageOps.exif_transpose(image)
    on_white = transparency == "white"
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image)
        grey = np.rint((values.astype(np.float32) / 257.0).clip(0, 255))  # 65535 -> 255
        if on_white and key is not None:
            grey[values == key] = 255
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if not (on_white and image.has_transparency_data):
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if key is not None:
        image.info["transparency"] = key
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return np.array(white)


def _transparent_colour(image: Image.Image) -> int | tuple[int, ...] | bytes | None:
    """What Pillow calls `transparency`, in the depth of the decoded pixels; None without any."""
    key = image.info.get("transparency")
    tiles = image.tile if isinstance(image, PngImageFile) else []
    scale = next((_KEY_SCALE.get(str(tile.args)) for tile in tiles), None)
    if key is None or scale is None:
        return key
    return tuple(int(v * scale) for v in key) if isinstance(key, tuple) else int(key * scale)


def _damaged(name: str, error: Exception) -> str:
    return f"{name}: cannot be read as an image ({error_line(error)})."
