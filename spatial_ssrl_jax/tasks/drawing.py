"""Drawing onto images: patch labels with borders, and numbered markers.

Sizes follow the image's shorter side, with minima that keep digits readable at 112 pixels.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spatial_ssrl_jax.common.errors import UserError

RED = (255, 0, 0)
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)

_MIN_LABEL = 13  # font size in pixels; its digits are 9 to 10 pixels high
_FINE = 4  # stamps are drawn this much larger and shrunk, for smooth edges


def draw_labels(image: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Frames each patch in thin red and writes its number at its top left.

    Args:
      image: [H, W, 3] uint8, H divisible by `rows` and W by `cols`.
      rows, cols: the grid of patches.

    Returns:
      [H, W, 3] uint8, a new image.
    """
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    height, width = image.shape[0] // rows, image.shape[1] // cols
    short = min(image.shape[:2])
    border, size = max(1, round(short / 250)), max(_MIN_LABEL, round(short / 14))
    for index in range(rows * cols):
        row, col = divmod(index, cols)
        x, y = col * width, row * height
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline=RED, width=border)
        at = (x + border + size // 6, y + border)
        outline = max(1, size // 10)
        draw.text(at, str(index), WHITE, _font(size), stroke_width=outline, stroke_fill=BLACK)
    return np.asarray(canvas)


def draw_markers(image: np.ndarray, points: Sequence[tuple[int, int]], radius: int) -> np.ndarray:
    """Puts the digits 1, 2, … in white circles with black edges around points.

    Args:
      image: [H, W, 3] uint8.
      points: [x, y] pixels in the order of the digits.
      radius: of the circles, in pixels; a marker is 2·radius + 1 wide.

    Returns:
      [H, W, 3] uint8, a new image.
    """
    return _marked(Image.fromarray(image), points, radius)


def _marked(canvas: Image.Image, points: Sequence[tuple[int, int]], radius: int) -> np.ndarray:
    """`draw_markers` onto the canvas itself."""
    for digit, (x, y) in enumerate(points, 1):
        stamp = _marker(digit, radius)
        canvas.paste(stamp, (x - radius, y - radius), stamp)
    return np.asarray(canvas)


def draw_markers_fitted(
    image: np.ndarray, points: Sequence[tuple[int, int]], radius: int, box: Sequence[int]
) -> np.ndarray:
    """`draw_markers` on the image fitted into a box, markers in proportion.

    Args:
      image, points, radius: as for `draw_markers`, in pixels of the image.
      box: see `fitted_size`.

    Returns:
      [h, w, 3] uint8, a new image.
    """
    height, width = fitted_size(image.shape[:2], box)
    if (height, width) == image.shape[:2]:
        return draw_markers(image, points, radius)
    y_scale, x_scale = height / image.shape[0], width / image.shape[1]
    fitted = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    # The centre of a pixel stays the centre.
    moved = [(int((x + 0.5) * x_scale), int((y + 0.5) * y_scale)) for x, y in points]
    return _marked(fitted, moved, round(radius * min(x_scale, y_scale)))


def fitted_size(size: tuple[int, int], box: Sequence[int]) -> tuple[int, int]:
    """(height, width) of an image that fills a box as far as its aspect allows.

    Args:
      size: (height, width) in pixels.
      box: (width, height) in pixels; empty leaves the size as it is.

    Raises:
      UserError: the box is neither.
    """
    if not box:
        return size
    if len(box) != 2:
        raise UserError(f"fit_box={tuple(box)} needs a width and a height, or nothing.")
    scale = min(box[0] / size[1], box[1] / size[0])
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


@lru_cache(maxsize=256)
def _marker(digit: int, radius: int) -> Image.Image:
    """One marker as an RGBA stamp of 2·radius + 1 pixels a side."""
    size = 2 * radius + 1
    side = size * _FINE
    stamp = Image.new("RGBA", (side, side), (*WHITE, 0))
    draw = ImageDraw.Draw(stamp)
    edge = max(_FINE, radius * _FINE // 8)
    draw.ellipse((0, 0, side - 1, side - 1), fill=WHITE, outline=BLACK, width=edge)
    font, text = _font(round(1.65 * radius) * _FINE), str(digit)
    left, top, right, bottom = font.getbbox(text)
    # By the digit's own box: text anchors centre the line, which leaves a digit off the middle.
    draw.text(((side - left - right) / 2, (side - top - bottom) / 2), text, BLACK, font)
    return stamp.resize((size, size), Image.Resampling.BOX)


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
