"""Rows of a benchmark's question file: TSV, JSON, JSONL, parquet or xlsx, without images' bytes.

A row is read once; its images' bytes stay in the file until an image is opened.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import parse_json, read_json
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.data.sources.parquet import RowGroups
from spatial_ssrl_jax.data.sources.row_paths import ALLOW_HINT
from spatial_ssrl_jax.eval.benchmarks.images import (
    BenchmarkImage,
    FileImage,
    ParquetImage,
    TsvImage,
    cell_items,
    find_file,
    tsv_cells,
)
from spatial_ssrl_jax.eval.benchmarks.xlsx import read_xlsx

# How an error about a bad row ends, and one about a damaged file.
FIX_HINT = "fix it, or leave it out (--allow-missing)"
_AGAIN = "copy or download it again"
_IMAGE, _INDEX = "image", "index"
# VLMEvalKit writes another row's index, never longer than this, for that row's image.
_LONGEST_INDEX = 64
_ROWS_AT_A_TIME = 16


class BadQuestionRow(UserError):
    """One row that cannot be asked; it is named, and left out where that is allowed."""


@dataclass(frozen=True)
class QuestionRow:
    """One row of a question file.

    Attributes:
      values: by column, the images' bytes left out; "" and None are the same as no value.
      name: the row in error messages.
      file: the question file.
      number: of the row in it, from 0.
      encoded: its images, where the file itself holds them.
      inside: the folder that the user named, which its paths may not leave; None allows any.
      media: whether its images and its video are wanted; without, none are looked for.
    """

    values: Mapping[str, Any]
    name: str
    file: Path
    number: int
    encoded: tuple[BenchmarkImage, ...] = ()
    inside: Path | None = None
    media: bool = True

    def get(self, column: str) -> Any:
        """A value as the file has it, "" where there is none; pandas writes NaN into JSON."""
        value = self.values.get(column)
        return "" if value is None or value != value else value

    def words(self, column: str) -> str:
        """A value as text, unchanged; raises `BadQuestionRow` where there is none."""
        value = str(self.get(column))
        if not value.strip():
            raise BadQuestionRow(f"{self.name} has no {column}: {FIX_HINT}.")
        return value

    def text(self, column: str) -> str:
        """`words` without white space around it."""
        return self.words(column).strip()

    def find(self, column: str) -> tuple[Path, ...]:
        """The files that a column names.

        Raises:
          BadQuestionRow: one is missing, or is where it may not be read.
        """
        names = self.items(column)
        if not names:
            raise BadQuestionRow(f"{self.name} has no {column}: {FIX_HINT}.")
        return tuple(self._file(name) for name in names)

    def items(self, column: str) -> list[str]:
        """The items of a list, which a table spells out in Python; raises `BadQuestionRow`."""
        value = self.get(column) or self.text(column)
        try:
            return list(map(str, value)) if isinstance(value, list) else cell_items(str(value))
        except ValueError as error:
            raise BadQuestionRow(f"{self.name}: its {column} is {error}: {FIX_HINT}.") from None

    def _file(self, name: str) -> Path:
        try:
            path = find_file(self.file.parent, name, self.inside)
        except ValueError as reason:
            raise BadQuestionRow(
                f"{self.name}: its file {name!r} is {reason}: {ALLOW_HINT}, or leave the row out "
                "(--allow-missing)."
            ) from None
        if path is None:
            raise BadQuestionRow(
                f"{self.name}: there is no {name} beside the file: put it there, or leave the row "
                "out (--allow-missing)."
            )
        return path

    def images(self, column: str = "image_path") -> tuple[BenchmarkImage, ...]:
        """The row's images, from the file itself or by their paths.

        Raises:
          BadQuestionRow: it has none, or one is missing.
        """
        if not self.media:
            return ()
        if not self.encoded and not self.get(column):
            raise BadQuestionRow(f"{self.name} has no image: {FIX_HINT}.")
        return self.encoded or tuple(FileImage(path) for path in self.find(column))

    def video(self, name: str) -> Path | None:
        """The video under a name; raises `BadQuestionRow` where it is missing."""
        return self._file(name) if self.media else None


def read_rows(file: Path, inside: Path | None) -> list[QuestionRow]:
    """All rows of a file in the format of its ending.

    Args:
      file: the question file.
      inside: the folder that the user named, which the rows' paths may not leave; None allows any.

    Raises:
      UserError: it is damaged.
    """
    readers = {
        ".tsv": _read_tsv,
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
        ".xlsx": _read_xlsx,
    }
    if file.suffix not in readers:
        raise UserError(f"{file}: expected a file that ends in {', '.join(readers)}.")
    try:
        rows = readers[file.suffix](file)
    except UserError:
        raise
    except Exception as error:  # readers raise nearly anything on a damaged file
        reason = f"{type(error).__name__}: {error_line(error)}"
        raise UserError(f"{file} cannot be read ({reason}): {_AGAIN}.") from error
    if not rows:
        raise UserError(f"{file} holds no row: {_AGAIN}.")
    return [replace(row, inside=inside) for row in rows]


def _name(file: Path, number: int) -> str:
    return f"row {number + 1} of {file.name}"


class _Lines(Iterator[str]):
    """Lines of an open file; `end` is the byte after the last one read."""

    def __init__(self, file: BinaryIO):
        self.file, self.end = file, 0

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        text = line.decode("utf-8-sig" if self.end == 0 else "utf-8")
        self.end += len(line)
        return text


@dataclass(frozen=True)
class _Cell:
    """An image cell: its row's bytes, its column, and its images or the row that has them.

    Attributes:
      start, length: bytes of the row in the file.
      column: of the cell.
      name: the row in error messages.
      count: images in the cell.
      other: index of the row whose images these are; None where they are in the cell.
    """

    start: int
    length: int
    column: int
    name: str
    count: int
    other: str | None

    def images(self, file: Path, cells: Mapping[str, "_Cell"]) -> tuple[BenchmarkImage, ...]:
        cell = self
        if self.other is not None:
            cell = cells.get(self.other, self)
            if cell.other is not None:
                raise UserError(
                    f"{self.name} takes its image from row {self.other!r}, which has none: "
                    "download the file again."
                )
        return tuple(
            TsvImage(file, cell.start, cell.length, cell.column, i, self.name)
            for i in range(cell.count)
        )


def _read_tsv(file: Path) -> list[QuestionRow]:
    with file.open("rb") as stream:
        lines = _Lines(stream)
        reader = tsv_cells(lines)
        header = next(reader, [])
        found: list[tuple[dict[str, str], str]] = []
        cells: dict[int, _Cell] = {}
        start = lines.end
        for number, line in enumerate(reader):
            name = _name(file, number)
            if len(line) != len(header):
                raise UserError(
                    f"{name} has {len(line)} columns and the first line {len(header)}: copy or "
                    "download the file again."
                )
            values = dict(zip(header, line, strict=True))
            image = values.pop(_IMAGE, "")
            if image:
                other = image if len(image) <= _LONGEST_INDEX and image[0] != "[" else None
                column, count = header.index(_IMAGE), len(cell_items(image))
                cells[number] = _Cell(start, lines.end - start, column, name, count, other)
            found.append((values, name))
            start = lines.end
    by_index = {found[i][0].get(_INDEX, ""): cell for i, cell in cells.items()}
    return [
        QuestionRow(values, name, file, i, cells[i].images(file, by_index) if i in cells else ())
        for i, (values, name) in enumerate(found)
    ]


def _read_json(file: Path) -> list[QuestionRow]:
    found = read_json(file)
    return _rows(file, found if isinstance(found, list) else [found])


def _read_jsonl(file: Path) -> list[QuestionRow]:
    lines = file.read_bytes().split(b"\n")
    return _rows(file, [parse_json(x, _name(file, i)) for i, x in enumerate(lines) if x.strip()])


def _read_xlsx(file: Path) -> list[QuestionRow]:
    return _rows(file, read_xlsx(file))


def _rows(file: Path, values: Sequence[Any]) -> list[QuestionRow]:
    for number, row in enumerate(values):
        if not isinstance(row, dict):
            raise UserError(f"{_name(file, number)} is no object with named fields.")
    return [QuestionRow(row, _name(file, i), file, i) for i, row in enumerate(values)]


def _read_parquet(file: Path) -> list[QuestionRow]:
    import pyarrow.parquet as pq

    reader = pq.ParquetFile(file)
    columns = [name for name in reader.schema_arrow.names if name != _IMAGE]
    values = reader.read(columns=columns).to_pylist()
    if _IMAGE not in reader.schema_arrow.names:
        return _rows(file, values)
    groups = RowGroups(_IMAGE)
    rows: list[QuestionRow] = []
    for batch in reader.iter_batches(_ROWS_AT_A_TIME, columns=[_IMAGE]):
        for cell in batch.column(0):
            number, name, value = len(rows), _name(file, len(rows)), cell.as_py()
            content = value["bytes"] if isinstance(value, dict) else value
            images = (ParquetImage(groups, file, number, name),) if content else ()
            rows.append(QuestionRow(values[number], name, file, number, images))
    return rows
