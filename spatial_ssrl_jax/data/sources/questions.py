"""`questions:PATH`: questions of one's own, with answers that can be verified.

PATH is a parquet, JSON, JSONL or Arrow file, a folder with files of one of these kinds, such as a
Hugging Face data set, or a Hub id, which is downloaded. `question_rows` has the forms of rows, and
`data.question_fields` names columns of other names. Of a folder with files for training, whose own
or folder's name begins with `train`, no others are read.

Images are encoded bytes, `{"bytes", "path"}`, or paths relative to the file. A row may have
several, or none; one that is no question is left out, named and counted, and of too many the run
stops. All of them are one task, `questions`; the name that a row gives as `task` is for metrics.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import FETCH, parse_json, read_json
from spatial_ssrl_jax.common.paths import check_regular
from spatial_ssrl_jax.common.reading import READING, QuestionFields, Reading
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.data.sources.parquet import column_names, read_paths, read_rows
from spatial_ssrl_jax.data.sources.question_rows import (
    BadRow,
    image_column,
    parse_row,
    text_columns,
)
from spatial_ssrl_jax.data.sources.question_source import (
    QuestionRows,
    QuestionSource,
    ReleasedQuestion,
)
from spatial_ssrl_jax.data.sources.row_paths import RowPaths
from spatial_ssrl_jax.tasks import questions

LAYOUT = "parquet, JSON or JSONL with problem, answer and images, conversations or messages"
_TABLES, _TEXTS = (".parquet", ".arrow"), (".jsonl", ".json")
_NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NAMES = 64  # of tasks that have metrics of their own

Rows = list[ReleasedQuestion | str]  # of a file, or why one is none


def open_questions(spec: str, path: str, reading: Reading = READING) -> QuestionSource:
    """Reads the questions' texts.

    Raises:
      UserError: PATH has no question, or cannot be downloaded.
    """
    location = Path(path).expanduser()
    if not path:
        raise UserError(f"source '{spec}': PATH is missing; expected {LAYOUT}.")
    if not location.exists():
        location = _from_hub(spec, path)
    files = [location] if location.is_file() else _files_below(location)
    found = [row for file in files for row in _read(spec, file, reading.fields)]
    rows, unnamed = _with_few_names([row for row in found if not isinstance(row, str)])
    bad = tuple(row for row in found if isinstance(row, str))
    if not rows:
        why = f" ({len(bad)} rows are none: {bad[0].rstrip('.')})" if bad else ""
        raise UserError(f"source '{spec}': found no question{why}; expected {LAYOUT}.")
    root = os.fspath(location if location.is_dir() else location.parent)
    paths = {os.fspath(file): RowPaths(os.path.dirname(file)) for file in files}
    return QuestionSource(
        spec, root, QuestionRows(tuple(rows), bad, unnamed=unnamed), paths, reading
    )


def _from_hub(spec: str, path: str) -> Path:
    """The folder of a data set of the Hub."""
    if not _HUB_ID.fullmatch(path) or path.endswith(_TABLES + _TEXTS):
        raise UserError(f"source '{spec}': there is no such file or folder; expected {LAYOUT}.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, repo_type="dataset"))
    except Exception as error:  # of the network, of the Hub, of the disk
        raise UserError(
            f"source '{spec}': there is no such file or folder, and the data set cannot be "
            f"downloaded from the Hub ({error_line(error)}): give a path, or check the network."
        ) from error


def _files_below(folder: Path) -> list[Path]:
    """The files with rows below a folder: those for training where some are named so."""
    for endings in (_TABLES, _TEXTS):
        files = sorted(
            file
            for file in folder.rglob("*")
            if file.suffix in endings and file.name not in _NOT_ROWS and file.is_file()
        )
        train = [file for file in files if _is_for_training(file.relative_to(folder))]
        if files:
            return train or files
    return []


def _is_for_training(file: Path) -> bool:
    return any(part.startswith("train") for part in file.parts)


def _read(spec: str, file: Path, fields: QuestionFields) -> Rows:
    check_regular(file, FETCH)
    if file.suffix not in _TABLES + _TEXTS:
        raise UserError(f"source '{spec}': {file} is no question file; expected {LAYOUT}.")
    try:
        return list(_table_rows(file, fields) if file.suffix in _TABLES else _rows(file, fields))
    except BadRow as error:  # of the whole file
        raise UserError(f"{file}: {error}; set data.question_fields.") from None
    except UserError:
        raise
    except Exception as error:  # readers raise nearly anything on a damaged file
        reason = f"{type(error).__name__}: {error_line(error)}"
        raise UserError(f"{file} cannot be read ({reason}); expected {LAYOUT}.") from error


def _table_rows(file: Path, fields: QuestionFields) -> Iterator[ReleasedQuestion | str]:
    """Of a parquet or Arrow file, whose images are read when they are needed."""
    names = column_names(file)
    column = image_column(names, fields)
    rows = read_rows(file, text_columns(names, fields))
    paths = read_paths(file, column) if column else [""] * len(rows)
    for number, (row, path) in enumerate(zip(rows, paths, strict=True)):
        yield _question(file, number, row, fields, column, path)


def _rows(file: Path, fields: QuestionFields) -> Iterator[ReleasedQuestion | str]:
    """Of a JSON file with a list, or of a file with an object in each line."""
    rows: Any
    if file.suffix == ".json":
        rows = read_json(file)
        if not isinstance(rows, list):
            raise UserError(f"{file} holds no list of questions; expected {LAYOUT}.")
    else:
        rows = [line for line in file.read_bytes().splitlines() if line.strip()]
    for number, row in enumerate(rows):
        if isinstance(row, bytes):
            try:
                row = parse_json(row, _name(file, number), "fix or remove it")
            except UserError as error:
                yield str(error)
                continue
        yield _question(file, number, row, fields, None, "")


def _question(
    file: Path, number: int, row: Any, fields: QuestionFields, column: str | None, path: str
) -> ReleasedQuestion | str:
    """A row's question, or why it is none.

    Args:
      file: of the row.
      number: of the row in it.
      row: its texts by column.
      fields: columns of other names.
      column: that its images are in; None where they are among its texts.
      path: of the first image in that column, "" where none is given.
    """
    try:
        if not isinstance(row, Mapping):
            raise BadRow("it is no object")
        found = parse_row(row, fields, column is not None)
    except BadRow as error:
        return f"{_name(file, number)}: {error}; fix or remove it."
    return ReleasedQuestion(
        task=questions.TASK.name,
        text=found.text,
        answer=found.answer,
        response=found.response,
        file=os.fspath(file),
        row=number,
        images=found.images,
        path=found.images[0] if found.images else path,
        kind=found.task,
        column=column or "",
    )


def _name(file: Path, row: int) -> str:
    return f"question {row} of {file}"


def _with_few_names(found: list[ReleasedQuestion]) -> tuple[list[ReleasedQuestion], int]:
    """The questions, without the rare of too many names; and how many have lost theirs."""
    names = Counter(question.kind for question in found if question.kind)
    rare = {name for name, _ in names.most_common()[_NAMES:]}
    rows = [replace(q, kind="") if q.kind in rare else q for q in found]
    return rows, sum(names[name] for name in rare)
