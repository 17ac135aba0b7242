"""HTML pages: one style for all, each a single file that needs no server."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

import numpy as np
from PIL import Image

_IMAGE_SIDE = 320  # longest side of an image inside a page, in pixels
_JPEG_QUALITY = 85


def page(title: str, body: str, scripts: Sequence[str] = ()) -> str:
    """A whole HTML page.

    Args:
      title: plain text.
      body: HTML.
      scripts: names of files in `assets/page`, put at the end.
    """
    code = "".join(f"<script>{_asset(name)}</script>" for name in scripts)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_asset('page.css')}</style>"
        f"<body>{body}{code}</body></html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files("spatial_ssrl_jax") / "assets" / "page" / name).read_text()


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table that scrolls sideways where it does not fit; cells are plain text."""

    def line(cells: Iterable[object], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}{body}</table></div>'


def filters(choices: Mapping[str, Iterable[object]]) -> str:
    """Select boxes by which `filter.js` filters the page's articles by their data fields."""
    selects = []
    for name, values in choices.items():
        options = "".join(f"<option>{html.escape(str(v))}</option>" for v in ("all", *values))
        selects.append(f'<label>{name} <select name="{name}">{options}</select></label>')
    return f'<p class="filters">{"".join(selects)}<output class="soft"></output></p>'


def image_uri(
    image: Image.Image | np.ndarray, side: int = _IMAGE_SIDE, quality: int = _JPEG_QUALITY
) -> str:
    """An image as a JPEG data URI.

    Args:
      image: a PIL image, or [H, W, 3] uint8.
      side: pixels of the longest side; a larger image is scaled down.
      quality: of the JPEG, up to 95.
    """
    small = image if isinstance(image, Image.Image) else Image.fromarray(image)
    small = small.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
