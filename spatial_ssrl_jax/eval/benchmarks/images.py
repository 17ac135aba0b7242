"""Images in benchmark files: each is read and decoded when it is opened."""

import ast
import base64
import binascii
import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from spatial_ssrl_jax.common.errors import BadImage
from spatial_ssrl_jax.data.images import image_size, open_image
from spatial_ssrl_jax.data.sources.parquet import RowGroups
from spatial_ssrl_jax.data.sources.row_paths import complete_path, is_inside

# Folders where a row's files may be, from the folder of the question file.
_FOLDERS = (".", "..", "images", "videos")
# One cell may hold several megabytes of base64; the library's own limit is 131,072 characters.
_LARGEST_CELL = 2**31 - 1


class BenchmarkImage(Protocol):
    """One image of a question; can be pickled, and holds no pixels."""

    @property
    def name(self) -> str:
        """The image in error messages."""
        ...

    def open(self) -> np.ndarray:
        """[H, W, 3] uint8, RGB; raises `BadImage`."""
        ...

    def size(self) -> tuple[int, int]:
        """(height, width) of the opened image, from its header alone; raises `BadImage`."""
        ...


@dataclass(frozen=True)
class FileImage:
    """An image in a file of its own."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def open(self) -> np.ndarray:
        return open_image(self.path)

    def size(self) -> tuple[int, int]:
        width, height = image_size(self.path)
        return height, width


@dataclass(frozen=True)
class TsvImage:
    """An image as base64 in a cell of a TSV file.

    Attributes:
      file: the TSV file.
      start, length: bytes of the row in it.
      column: of the cell.
      index: of the image in the cell.
      name: the image in error messages.
    """

    file: Path
    start: int
    length: int
    column: int
    index: int
    name: str

    def open(self) -> np.ndarray:
        return open_image(self._encoded(), self.name)

    def size(self) -> tuple[int, int]:
        width, height = image_size(self._encoded(), self.name)
        return height, width

    def _encoded(self) -> bytes:
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            text = stream.read(self.length).decode()
        cell = next(tsv_cells(iter([text])))[self.column]
        try:
            return base64.b64decode(cell_items(cell)[self.index], validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadImage(f"{self.name}: is not base64 ({error}).") from None


@dataclass(frozen=True)
class ParquetImage:
    """An image inside a parquet file."""

    groups: RowGroups
    file: Path
    row: int
    name: str

    def open(self) -> np.ndarray:
        return open_image(self._encoded(), self.name)

    def size(self) -> tuple[int, int]:
        width, height = image_size(self._encoded(), self.name)
        return height, width

    def _encoded(self) -> bytes:
        cell = self.groups.value(str(self.file), self.row)
        return cell["bytes"] if isinstance(cell, dict) else cell


def tsv_cells(lines: Iterator[str]) -> Iterator[list[str]]:
    """Rows of a TSV file as pandas writes it: quotes around cells with a tab, quote or newline."""
    csv.field_size_limit(_LARGEST_CELL)
    return csv.reader(lines, delimiter="\t")


def cell_items(cell: str) -> list[str]:
    """The items of an image cell: one, or those of a Python list that it spells out."""
    if not cell.startswith("["):
        return [cell] if cell else []
    try:
        return [str(item) for item in ast.literal_eval(cell)]
    except (SyntaxError, ValueError):
        raise ValueError("no list") from None


def find_file(folder: Path, name: str, inside: Path | None) -> Path | None:
    """A row's file: beside the question file, above it, or below `images` or `videos`.

    Args:
      folder: of the question file.
      name: the path in the row.
      inside: the folder that the file must be below; None allows any.

    Returns:
      The file, None where it is missing.

    Raises:
      ValueError: it is not found, and might be where it may not be read.
    """
    refused = False
    for above in _FOLDERS:
        path = complete_path(folder / above, name)
        if inside is None or is_inside(path, inside):
            if os.path.isfile(path):
                return Path(path)
        else:  # a plain name may be looked for above the folder in vain
            refused |= above != ".." or os.path.isfile(path)
    if refused:
        raise ValueError(f"outside of {inside}")
    return None
