"""`ssrl81k:PATH`: ready-made questions, in the two formats of the released data.

PATH is a parquet file with `problem, answer, images`, an SFT JSON file with `instruction,
input, output, images`, or a folder with files of one of the formats. `images` holds a list of
images for each question: encoded bytes, `{"bytes", "path"}`, or paths relative to the file, which
stay inside PATH, or inside the folder of PATH where it is a file, unless others are allowed.
Questions enter the pipeline as examples of their task: the tasks' weights apply to them as to
images, the tasks' other settings do not.

Questions whose first images have the same path are of one image, and are held out together; so
are those whose paths agree up to a `#`, as in the files that `preview` writes.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.fingerprint import fingerprint, hash_texts
from spatial_ssrl_jax.common.json_file import FETCH, as_object, read_json
from spatial_ssrl_jax.common.paths import check_regular
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.data.images import image_size, open_source_image
from spatial_ssrl_jax.data.sources.parquet import RowGroups, check_columns, read_paths, read_texts
from spatial_ssrl_jax.data.sources.row_paths import ALLOW_HINT, complete_path, is_inside
from spatial_ssrl_jax.tasks.answers import last_box
from spatial_ssrl_jax.tasks.example import Example
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

_HASHED = 64  # images whose content is hashed
LAYOUT = "parquet with problem, answer, images, or JSON with instruction, input, output, images"
# A phrase of each task's question that no other's has; the released texts vary a little.
_PHRASES = {
    "shuffle": "shuffled",
    "flip": "flipped",
    "crop": "missing part",
    "depth": "sort the depths",
    "position": "there is a camera at position",
}


@dataclass(frozen=True)
class ReleasedQuestion:
    """One ready-made question.

    Attributes:
      task: the task that it belongs to.
      text: the question without the format prompt.
      answer: the exact right answer.
      response: a whole SFT response, or "" where the data holds none.
      file: path of its file.
      row: its index in the file.
      images: images as paths or bytes; None where they are read from `file` when needed.
      path: of the first image, as in the file; "" where none is given.
    """

    task: str
    text: str
    answer: str
    response: str
    file: str
    row: int
    images: tuple[str | bytes, ...] | None
    path: str


class QuestionSource:
    """Questions of one or more files; images are read on access.

    Args:
      spec: the SPEC as the user wrote it.
      root: names are relative to this folder.
      questions: in order; their tasks need no depth, as their images are complete.
      reading: how images are read.

    Raises:
      UserError: an image is outside of `root`, where that is known without reading a row's images.
    """

    has_depth = has_distances = False

    def __init__(
        self,
        spec: str,
        root: str,
        questions: tuple[ReleasedQuestion, ...],
        reading: Reading = READING,
    ):
        self.spec, self.root, self.questions, self.reading = spec, root, questions, reading
        self._groups = RowGroups("images")
        for question in questions:
            for image in question.images or ():
                if isinstance(image, str):
                    self._complete(question, image)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The folder of the files, and those of images that are given by path."""
        return (self.root, *sorted(set(map(os.path.dirname, self._image_files()))))

    def fingerprint(self) -> str:
        files = {os.path.relpath(q.file, self.root): q.file for q in self.questions}
        images = {os.path.relpath(path, self.root): path for path in self._image_files()}
        return hash_texts([fingerprint(files), fingerprint(images, _HASHED)])

    def _image_files(self) -> set[str]:
        """Paths of the images that are given by path and may be read."""
        found = {
            complete_path(os.path.dirname(question.file), image)
            for question in self.questions
            for image in (*(question.images or ()), question.path)
            if isinstance(image, str) and image
        }
        return {path for path in found if self._may_read(path)}

    def _may_read(self, path: str) -> bool:
        return self.reading.allow_outside_paths or is_inside(path, self.root)

    def _complete(self, question: ReleasedQuestion, image: str) -> str:
        """The whole path of a question's image; raises `BadImage` where it may not be read."""
        path = complete_path(os.path.dirname(question.file), image)
        if not self._may_read(path):
            raise BadImage(
                f"question {question.row} of {question.file}: its image {image!r} is outside of "
                f"{self.root}: {ALLOW_HINT}."
            )
        return path

    def __len__(self) -> int:
        return len(self.questions)

    def name(self, index: int) -> str:
        question = self.questions[index]
        return f"{os.path.relpath(question.file, self.root)}#{question.row}"

    def origin(self, index: int) -> str:
        """The path of the image that a question is about, if its row has one; else its own name."""
        return self.questions[index].path.partition("#")[0] or self.name(index)

    def task(self, index: int) -> str:
        return self.questions[index].task

    def sizes(self, index: int) -> list[tuple[int, int]]:
        name = self.name(index)
        sizes = []
        for image in self._images(index):
            width, height = image_size(image, _image_name(image, name), listed=True)
            sizes.append((height, width))
        return sizes

    def __getitem__(self, index: int) -> Example:
        question, name = self.questions[index], self.name(index)
        images = self._images(index)
        return Example(
            task=question.task,
            kind="released",
            images=tuple(
                open_source_image(image, _image_name(image, name), self.reading.transparency)
                for image in images
            ),
            question=question.text,
            answer=question.answer,
            reason=f"The answer is {question.answer}.",
            truth={},
            source={"spec": self.spec, "record": name, "image": _image_name(images[0], name)},
            response=question.response,
        )

    def _images(self, index: int) -> list[str | bytes]:
        """The question's images, encoded or as complete paths."""
        question = self.questions[index]
        cells = question.images
        if cells is None:
            found = self._groups.value(question.file, question.row)
            cells = [_cell(cell) for cell in found] if isinstance(found, list) else []
        if not cells:
            raise BadImage(f"{self.name(index)}: its row has no image.")
        return [self._complete(question, c) if isinstance(c, str) else c for c in cells]


def open_ssrl81k(spec: str, path: str, reading: Reading = READING) -> QuestionSource:
    """Reads the questions' texts.

    Raises:
      UserError: PATH has none, one of no known task, or one whose image is outside and may not be.
    """
    location = Path(path).expanduser()
    if not path or not location.exists():
        raise UserError(f"source '{spec}': there is no such file or folder; expected {LAYOUT}.")
    files = [location] if location.is_file() else _question_files(location)
    questions = [q for file in files for q in _read(spec, file)]
    if not questions:
        raise UserError(f"source '{spec}': found no question; expected {LAYOUT}.")
    root = location if location.is_dir() else location.parent
    return QuestionSource(spec, os.fspath(root), tuple(questions), reading)


def _question_files(folder: Path) -> list[Path]:
    """All parquet files below a folder, else all JSON files."""
    return sorted(folder.rglob("*.parquet")) or sorted(folder.rglob("*.json"))


def _read(spec: str, file: Path) -> list[ReleasedQuestion]:
    check_regular(file, FETCH)
    try:
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
        return [_question(spec, os.fspath(file), i, *row) for i, row in enumerate(rows)]
    except UserError:
        raise
    except Exception as error:  # readers raise nearly anything on a damaged file
        reason = f"{type(error).__name__}: {error_line(error)}"
        raise UserError(f"{file} cannot be read ({reason}); expected {LAYOUT}.") from error


def _parquet_rows(file: Path) -> list[tuple[str, str, str, None, str]]:
    check_columns(file, ("problem", "answer", "images"))
    texts, paths = read_texts(file, ("problem", "answer")), read_paths(file, "images")
    for number, row in enumerate(texts):
        if not all(isinstance(text, str) and text.strip() for text in row):
            raise UserError(
                f"question {number} of {file} has a problem or an answer that is no text: fix or "
                "remove it."
            )
    rows = zip(texts, paths, strict=True)
    return [(problem, answer, "", None, path) for (problem, answer), path in rows]


def _json_rows(file: Path) -> list[tuple[str, str, str, tuple[str, ...], str]]:
    rows, found = [], read_json(file)
    if not isinstance(found, list):
        raise UserError(f"{file} holds no list of questions; expected {LAYOUT}.")
    for number, row in enumerate(found):
        name = f"question {number} of {file}"
        fields = as_object(row, name, "fix or remove it")
        texts = fields.get("instruction", str), fields.get("input", str, "")
        output = fields.get("output", str)
        answer = last_box(output)
        if answer is None:
            raise UserError(f"{name}: its output has no \\boxed answer; fix or remove it.")
        alone = isinstance(fields.values.get("images"), str)
        images = (fields.get("images", str),) if alone else fields.items("images", str)
        if not images:
            fields.refuse("images", "at least one path")
        rows.append(("\n".join(filter(None, texts)), answer, output, images, images[0]))
    return rows


def _question(
    spec: str,
    file: str,
    row: int,
    text: str,
    answer: str,
    response: str,
    images: tuple[str, ...] | None,
    path: str,
) -> ReleasedQuestion:
    task = next((name for name, phrase in _PHRASES.items() if phrase in text), None)
    if task is None:
        raise UserError(
            f"source '{spec}': question {row} of {file} is of none of the tasks "
            f"{', '.join(_PHRASES)}; remove it."
        )
    # The pipeline appends the format prompt to every question.
    text = text.replace(FORMAT_PROMPT, "").strip()
    return ReleasedQuestion(task, text, str(answer), response, file, row, images, path)


def _cell(cell: dict[str, Any] | str | bytes) -> str | bytes:
    """An image of a parquet list: its encoded bytes, else its path."""
    if isinstance(cell, dict):
        return cell.get("bytes") or cell.get("path") or ""
    return cell


def _image_name(image: str | bytes, name: str) -> str:
    return image if isinstance(image, str) else name
