"""`ssrl81k:PATH`: ready-made questions, in the two formats of the released data.

PATH is a parquet file with `problem, answer, images`, an SFT JSON file with `instruction,
input, output, images`, or a folder with files of one of the formats. `images` holds a list of
images for each question: encoded bytes, `{"bytes", "path"}`, or paths relative to the file, which
stay inside PATH, or inside the folder of PATH where it is a file, unless others are allowed.
Questions enter the pipeline as examples of their task: the tasks' weights apply to them as to
images, the tasks' other settings do not.

The authors keep the files and their images apart, as `data/parquets/train.parquet` and
`data/images/crop/…`. So a file's paths that lead nowhere are looked for in the folder `images` (or
`coldstart_SFT_images`) beside the file, or up to two folders above it, whatever stands before that
folder's name in them.

A row that is no question of a task is left out, named and counted; of too many the run stops.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import FETCH, as_object, read_json
from spatial_ssrl_jax.common.paths import check_regular
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.common.text import error_line, shown
from spatial_ssrl_jax.data.sources.parquet import check_columns, holds_bytes, read_paths, read_texts
from spatial_ssrl_jax.data.sources.question_source import (
    QuestionRows,
    QuestionSource,
    ReleasedQuestion,
)
from spatial_ssrl_jax.data.sources.row_paths import RowPaths
from spatial_ssrl_jax.tasks.answers import last_box
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

LAYOUT = "parquet with problem, answer, images, or JSON with instruction, input, output, images"
_FIX = "fix or remove it"
# A phrase of each task's question that no other's has; the released texts vary a little.
_PHRASES = {
    "shuffle": "shuffled",
    "flip": "flipped",
    "crop": "missing part",
    "depth": "sort the depths",
    "position": "there is a camera at position",
}
_REGISTRY = "dataset_info.json"  # LLaMA-Factory's list of data sets, beside them

Rows = list[ReleasedQuestion | str]  # of a file, or why one is none


def open_ssrl81k(spec: str, path: str, reading: Reading = READING) -> QuestionSource:
    """Reads the questions' texts.

    Raises:
      UserError: PATH has none, or none of a file's images is where it may be.
    """
    location = Path(path).expanduser()
    if not path or not location.exists():
        raise UserError(f"source '{spec}': there is no such file or folder; expected {LAYOUT}.")
    files = [location] if location.is_file() else _question_files(location)
    rows = _without_copies([row for file in files for row in _read(file)])
    if not rows.questions:
        why = f" ({len(rows.bad)} rows are none: {rows.bad[0].rstrip('.')})" if rows.bad else ""
        raise UserError(f"source '{spec}': found no question{why}; expected {LAYOUT}.")
    root = os.fspath(location if location.is_dir() else location.parent)
    inside = None if reading.allow_outside_paths else root
    paths = {file: _find_images(file, rows, inside) for file in map(os.fspath, files)}
    source = QuestionSource(spec, root, rows, paths, reading)
    for file in files:
        if file.suffix != ".parquet" or not holds_bytes(file, "images"):
            source.check_found(os.fspath(file))
    return source


def _question_files(folder: Path) -> list[Path]:
    """All parquet files below a folder, else all JSON files."""
    tables = sorted(folder.rglob("*.parquet"))
    return tables or sorted(file for file in folder.rglob("*.json") if file.name != _REGISTRY)


def _read(file: Path) -> Rows:
    check_regular(file, FETCH)
    try:
        return list(_parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file))
    except UserError:
        raise
    except Exception as error:  # readers raise nearly anything on a damaged file
        reason = f"{type(error).__name__}: {error_line(error)}"
        raise UserError(f"{file} cannot be read ({reason}); expected {LAYOUT}.") from error


def _parquet_rows(file: Path) -> Iterator[ReleasedQuestion | str]:
    check_columns(file, ("problem", "answer", "images"))
    texts, paths = read_texts(file, ("problem", "answer")), read_paths(file, "images")
    for number, ((problem, answer), path) in enumerate(zip(texts, paths, strict=True)):
        try:
            name = _name(file, number)
            text, answer = _text(problem, "problem", name), _text(answer, "answer", name)
            yield _question(file, number, text, answer, "", None, path)
        except UserError as error:
            yield str(error)


def _json_rows(file: Path) -> Iterator[ReleasedQuestion | str]:
    found = read_json(file)
    if not isinstance(found, list):
        raise UserError(f"{file} holds no list of questions; expected {LAYOUT}.")
    for number, row in enumerate(found):
        try:
            yield _json_question(file, number, row)
        except UserError as error:
            yield str(error)


def _json_question(file: Path, number: int, row: Any) -> ReleasedQuestion:
    name = _name(file, number)
    fields = as_object(row, name, _FIX)
    texts = fields.get("instruction", str), fields.get("input", str, "")
    output = fields.get("output", str)
    answer = last_box(output)
    if not answer:
        raise UserError(f"{name}: its output has no \\boxed answer; {_FIX}.")
    alone = isinstance(fields.values.get("images"), str)
    images = (fields.get("images", str),) if alone else fields.items("images", str)
    if not images or not all(images):
        fields.refuse("images", "at least one path")
    text = "\n".join(filter(None, texts))
    return _question(file, number, text, answer, output, images, images[0])


def _text(value: Any, column: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name}: its {column} is {shown(value)}, expected text; {_FIX}.")
    return value


def _question(
    file: Path,
    row: int,
    text: str,
    answer: str,
    response: str,
    images: tuple[str, ...] | None,
    path: str,
) -> ReleasedQuestion:
    task = next((name for name, phrase in _PHRASES.items() if phrase in text), None)
    if task is None:
        tasks = ", ".join(_PHRASES)
        raise UserError(f"{_name(file, row)} is of none of the tasks {tasks}; remove it.")
    # The pipeline appends the format prompt to every question.
    text = text.replace(FORMAT_PROMPT, "").strip()
    return ReleasedQuestion(task, text, answer, response, os.fspath(file), row, images, path)


def _name(file: Path, row: int) -> str:
    return f"question {row} of {file}"


def _without_copies(rows: Rows) -> QuestionRows:
    """The rows by what they are; the authors' validation set is a copy of training questions."""
    questions, bad, copies = [], [], []
    seen: dict[tuple[str, ...], str] = {}
    for row in rows:
        if isinstance(row, str):
            bad.append(row)
        elif row.path and seen.setdefault((row.path, row.text, row.answer), row.file) != row.file:
            copies.append(_name(Path(row.file), row.row))
        else:
            questions.append(row)
    return QuestionRows(tuple(questions), tuple(bad), tuple(copies))


def _find_images(file: str, rows: QuestionRows, inside: str | None) -> RowPaths:
    paths = [question.path for question in rows.questions if question.file == file]
    return RowPaths.find(os.path.dirname(file), list(filter(None, paths)), inside)
