"""The pages that people look at: one look for all, each a file that needs no server."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from importlib import resources

import numpy as np
from PIL import Image

_PICTURE = 320  # longest side of an image that stands inside a page, in pixels
_QUALITY = 85


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

    lines = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}{lines}</table></div>'


def filters(choices: dict[str, Iterable[object]]) -> str:
    """Selects by which `filter.js` chooses among the page's articles, by their data fields."""
    selects = []
    for name, values in choices.items():
        options = "".join(f"<option>{html.escape(str(v))}</option>" for v in ("all", *values))
        selects.append(f'<label>{name} <select name="{name}">{options}</select></label>')
    return f'<p class="filters">{"".join(selects)}<output class="soft"></output></p>'


def image_uri(
    picture: Image.Image | np.ndarray, side: int = _PICTURE, quality: int = _QUALITY
) -> str:
    """An image as a JPEG data URI, brought to at most `side` pixels a side; quality up to 95."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.convert("RGB")
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
