"""Frames around images: white or black bars that would reveal an answer.

Each patch of a scanned or letterboxed image shows where it comes from, whatever is in it. NYU's
photos have such a frame.
"""

import numpy as np

_WHITE, _BLACK = 240, 15  # grey levels from which, and up to which, a pixel may belong to a bar
_MIN_FRACTION = 0.95  # of such pixels in a bar's line
_BLEND = 2  # lines beside a bar in which it blends with the image
_MIN_LINES = 16  # an image with fewer is not examined
_STEP = 4  # one in so many pixels of a line is examined

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; the last two exclusive


def inner_box(image: np.ndarray) -> Box:
    """The box inside an image's frame; the whole image where it has none.

    Bars count in pairs only, left and right or top and bottom, so that a plain sky stays; and only
    while at least half the image is between them, so that a night stays.

    Args:
      image: [H, W, 3] uint8.
    """
    top, bottom = _between_bars(image[:, ::_STEP])
    left, right = _between_bars(image[::_STEP].swapaxes(0, 1))
    return left, top, right, bottom


def trim_frame(image: np.ndarray) -> tuple[np.ndarray, dict[str, list[int]]]:
    """The image inside its frame, and the entry for `truth`: `{}` without a frame.

    Returns:
      A view [h, w, 3] of the image, and `{"frame": [x, y, w, h]}`, its box in the original.
    """
    left, top, right, bottom = inner_box(image)
    if (right - left, bottom - top) == (image.shape[1], image.shape[0]):
        return image, {}
    inside = image[top:bottom, left:right]
    return inside, {"frame": [left, top, right - left, bottom - top]}


def _between_bars(lines: np.ndarray) -> tuple[int, int]:
    """First and end line [start, end) of the content between two bars; lines: [n, m, 3] uint8."""
    count = len(lines)
    if count < _MIN_LINES or not _is_bar(lines[[0, 1, -2, -1]]).all():
        return 0, count
    content = np.flatnonzero(~_is_bar(lines))
    if len(content) == 0:
        return 0, count
    start, end = int(content[0]) + _BLEND, int(content[-1]) + 1 - _BLEND
    return (start, end) if 2 * (end - start) >= count else (0, count)


def _is_bar(lines: np.ndarray) -> np.ndarray:
    white = (lines.min(axis=2) >= _WHITE).mean(axis=1)
    black = (lines.max(axis=2) <= _BLACK).mean(axis=1)
    return np.maximum(white, black) >= _MIN_FRACTION
