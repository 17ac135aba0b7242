"""Parquet files of questions: text columns, random access to rows with images, and writing."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.retry import with_retries
from spatial_ssrl_jax.common.text import error_line

if TYPE_CHECKING:
    from pyarrow import Table
    from pyarrow.parquet import ColumnSchema, ParquetFile

_KEPT = 4  # row groups a thread caches: they are decoded whole, for a single row too
_GROUP = 16  # questions in a row group that is written, a few megabytes


class RowGroups:
    """Single rows of a column; pickles without its cache.

    Args:
      column: its name.
    """

    def __init__(self, column: str):
        self.column = column
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"column": self.column}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.column, self._local = state["column"], threading.local()

    def value(self, file: str, row: int) -> Any:
        """The value of one row, as Python types; retries an unavailable file.

        Raises:
          BadImage: the row is damaged.
        """

        def read() -> Any:
            try:
                return self._value(file, row)
            except (OSError, ValueError) as error:
                self._local.__dict__.setdefault("files", {}).pop(file, None)  # reopened
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                reason = error_line(error)
                raise BadImage(f"{file}#{row}: cannot be read ({reason}).") from error

        return with_retries(read, file)

    def _value(self, file: str, row: int) -> Any:
        files = self._local.__dict__.setdefault("files", {})
        if file.endswith(".arrow"):
            if file not in files:
                files[file] = open_arrow(file)
            return files[file][self.column][row].as_py()
        if file not in files:
            files[file] = _open(file)
        reader, starts = files[file]
        group = int(np.searchsorted(starts, row, side="right")) - 1
        groups = self._local.__dict__.setdefault("groups", {})
        if (file, group) not in groups:
            while len(groups) >= _KEPT:
                del groups[next(iter(groups))]
            groups[file, group] = reader.read_row_group(group, columns=[self.column])[self.column]
        return groups[file, group][row - int(starts[group])].as_py()


def _open(file: str) -> tuple["ParquetFile", np.ndarray]:
    """An open file and [row groups] int64, the first row of each of its row groups."""
    import pyarrow.parquet as pq

    reader = pq.ParquetFile(file)
    sizes = [reader.metadata.row_group(i).num_rows for i in range(reader.num_row_groups)]
    return reader, np.cumsum([0, *sizes[:-1]])


def column_names(file: Path) -> list[str]:
    """The columns of a parquet or Arrow file."""
    import pyarrow.parquet as pq

    return (open_arrow(file).schema if file.suffix == ".arrow" else pq.read_schema(file)).names


def read_rows(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of some columns of a parquet or Arrow file; nothing else of it is read."""
    import pyarrow.parquet as pq

    if file.suffix == ".arrow":
        return open_arrow(file).select(list(columns)).to_pylist()
    rows = pq.ParquetFile(file).metadata.num_rows
    return pq.read_table(file, columns=list(columns)).to_pylist() if columns else [{}] * rows


def open_arrow(file: str | Path) -> "Table":
    """An Arrow file, stream or random access, mapped into memory."""
    import pyarrow as pa

    mapped = pa.memory_map(str(file))
    try:
        return pa.ipc.open_stream(mapped).read_all()
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_file(mapped).read_all()


def read_texts(file: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows of some text columns; nothing else of the file is read."""
    import pyarrow.parquet as pq

    table = pq.read_table(file, columns=list(columns))
    return list(zip(*(table[c].to_pylist() for c in columns), strict=True))


def check_columns(file: Path, columns: Sequence[str]) -> None:
    """Raises `UserError` where a file lacks a column."""
    import pyarrow.parquet as pq

    present = pq.read_schema(file).names
    missing = [name for name in columns if name not in present]
    if missing:
        raise UserError(
            f"{file} has no column {missing[0]}, only {', '.join(present) or 'none'}: rename its "
            "columns, or give another file."
        )


def read_paths(file: Path, column: str) -> list[str]:
    """The first image's path in each row of images, or of lists of them; "" where none is given.

    The images' bytes are not read, and of Arrow files no paths either.
    """
    import pyarrow.parquet as pq

    if file.suffix == ".arrow":
        return [""] * open_arrow(file).num_rows
    reader = pq.ParquetFile(file)
    leaves = [reader.schema.column(i) for i in range(len(reader.schema.names))]
    found = next((leaf.path for leaf in leaves if _is_path(leaf, column)), None)
    if found is None:
        return [""] * reader.metadata.num_rows
    cells = reader.read(columns=[found])[column].to_pylist()
    firsts = [(row or [None])[0] if isinstance(row, list) else row for row in cells]
    return [(cell["path"] if isinstance(cell, dict) else cell) or "" for cell in firsts]


def holds_bytes(file: Path, column: str) -> bool:
    """Whether a list of images holds any encoded one, or may: from the file's footer alone."""
    import pyarrow.parquet as pq

    reader = pq.ParquetFile(file)
    leaves = [reader.schema.column(i) for i in range(len(reader.schema.names))]
    for number, leaf in enumerate(leaves):
        if leaf.path.split(".")[0] != column or leaf.logical_type.type == "STRING":
            continue
        for group in range(reader.num_row_groups):
            counts = reader.metadata.row_group(group).column(number).statistics
            if counts is None or not counts.has_null_count or counts.num_values:
                return True
    return False


def _is_path(leaf: "ColumnSchema", column: str) -> bool:
    """Whether a leaf of the schema holds paths: strings, or the `path` of structs."""
    name, *rest = leaf.path.split(".")  # column, perhaps list and element, perhaps a field
    is_text = leaf.logical_type.type == "STRING"
    rest = rest[2:] if rest[:1] == ["list"] else rest
    return name == column and is_text and rest in ([], ["path"])


def write_questions(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes `problem, answer, images` in the format of the released data.

    Args:
      file: to write.
      rows: each with `problem`, `answer`, and `images`: a list of `{"bytes", "path"}`, an encoded
        image and its name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("problem", pa.string()), ("answer", pa.string()), ("images", pa.list_(image))]
    )
    pq.write_table(pa.Table.from_pylist(list(rows), schema), file, row_group_size=_GROUP)
