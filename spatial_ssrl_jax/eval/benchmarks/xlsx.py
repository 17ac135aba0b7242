"""Tables in Excel's format: the first sheet as rows of text, within limits of size."""

import importlib.util
import itertools
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from spatial_ssrl_jax.common.errors import UserError

LONGEST_CELL = 32_767  # characters, of Excel's format; pandas cuts longer ones
_LARGEST = 2**30  # bytes unpacked: a small file can unpack to any size
_MOST_ROWS = 2**20  # of Excel's format; a file may claim to have more


def read_xlsx(file: Path) -> list[dict[str, str]]:
    """The rows of the first sheet by the names in its first row, "" for an empty cell.

    Raises:
      UserError: openpyxl is missing, or the file is damaged or too large.
    """
    if importlib.util.find_spec("openpyxl") is None:
        raise UserError(
            f"{file} needs the extra [xlsx]: install it with pip install 'spatial_ssrl_jax[xlsx]', "
            "or save the table as TSV."
        )
    _check_size(file)
    from openpyxl import load_workbook

    with (
        warnings.catch_warnings(action="ignore"),  # of styles, which are not read
        closing(load_workbook(file, read_only=True, data_only=True)) as book,
    ):
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # what the file claims; rows are as wide as their last cell
        return list(_by_name(sheet.iter_rows(values_only=True, max_row=_MOST_ROWS)))


def _check_size(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(part.file_size for part in archive.infolist())
    except zipfile.BadZipFile:
        raise UserError(
            f"{file} is no Excel table, or only a part of one: copy it again."
        ) from None
    if size > _LARGEST:
        raise UserError(
            f"{file} unpacks to {size / 2**30:.1f} GiB, and at most {_LARGEST / 2**30:.0f} GiB are "
            "read: save the table as TSV."
        )


def _by_name(rows: Iterator[tuple[object, ...]]) -> Iterator[dict[str, str]]:
    """Rows as dicts; without the empty ones, and without columns that have no name."""
    header = [_text(cell) for cell in next(rows, ())]
    for row in rows:
        cells = row[: len(header)]
        if any(cell is not None for cell in cells):
            texts = itertools.zip_longest(header, map(_text, cells), fillvalue="")
            yield {name: text for name, text in texts if name}


def _text(value: object) -> str:
    """A cell as text; \\r is escaped in Excel's format."""
    return "" if value is None else str(value).replace("_x000D_", "\r")
