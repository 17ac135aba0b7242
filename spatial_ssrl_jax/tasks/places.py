"""Where points lie in an image, in words."""

from collections.abc import Sequence

_ROWS, _COLUMNS = ("upper", "middle", "lower"), ("left", "centre", "right")


def places_in_words(points: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> str:
    """A sentence like `1 is upper left, 2 is middle centre.`, of thirds of the image.

    Args:
      points: [x, y] in pixels of each marker, from marker 1.
      shape: height and width of the image in pixels.
    """
    height, width = shape[:2]
    words = [
        f"{marker} is {_ROWS[3 * y // height]} {_COLUMNS[3 * x // width]}"
        for marker, (x, y) in enumerate(points, 1)
    ]
    return ", ".join(words) + "."
