"""What is drawn onto pictures: patch labels with borders, and numbered markers.

Sizes follow the picture's shorter side, with floors that keep digits readable at 112 pixels.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RED = (255, 0, 0)
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def marker_radius(height: int, width: int) -> int:
    """Radius in pixels of a numbered marker."""
    return max(7, round(min(height, width) / 40))


def draw_markers(image: np.ndarray, points: list[tuple[int, int]]) -> np.ndarray:
    """The picture with the digits 1, 2, … in white circles around `points` ([x, y] pixels)."""
    canvas = Image.fromarray(image)
    radius = marker_radius(*image.shape[:2])
    draw = ImageDraw.Draw(canvas)
    for digit, (x, y) in enumerate(points, 1):
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=WHITE, outline=BLACK, width=max(1, radius // 8))
        draw.text((x, y), str(digit), fill=BLACK, font=_font(round(radius * 1.6)), anchor="mm")
    return np.asarray(canvas)


def draw_labels(image: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """The picture with a thin red border and a number at the top left of each of its patches."""
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    height, width = image.shape[0] // rows, image.shape[1] // cols
    short = min(image.shape[:2])
    border, size = max(1, round(short / 250)), max(11, round(short / 14))
    for place in range(rows * cols):
        row, col = divmod(place, cols)
        x, y = col * width, row * height
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline=RED, width=border)
        at = (x + border + size // 6, y + border)
        outline = max(1, size // 10)
        draw.text(at, str(place), WHITE, _font(size), stroke_width=outline, stroke_fill=BLACK)
    return np.asarray(canvas)
