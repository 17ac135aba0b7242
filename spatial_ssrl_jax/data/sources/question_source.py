"""Ready-made questions as a source: each is an example of its task, with images in files or rows.

Questions whose first images have the same path are of one image, and are held out together; so
are those whose paths agree up to a `#`, as in the files that `preview` writes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.fingerprint import fingerprint, hash_texts
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.common.retry import is_away
from spatial_ssrl_jax.data.images import image_size, open_source_image
from spatial_ssrl_jax.data.placeholders import chat_content
from spatial_ssrl_jax.data.sources.parquet import RowGroups
from spatial_ssrl_jax.data.sources.row_paths import (
    ALLOW_HINT,
    IMAGE_FOLDERS,
    RowPaths,
    is_inside,
)
from spatial_ssrl_jax.tasks import questions
from spatial_ssrl_jax.tasks.example import Example

_HASHED = 64  # images whose content is hashed
_NAMED = 5  # bad rows in a note


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
      images: images as paths; None where they are read from `file` when needed.
      path: of the first image, as in the file; "" where none is given.
      kind: the variety within the task.
      column: that images are in which are read from `file`.
    """

    task: str
    text: str
    answer: str
    response: str
    file: str
    row: int
    images: tuple[str, ...] | None
    path: str
    kind: str = "released"
    column: str = "images"

    @property
    def may_lack_images(self) -> bool:
        """Whether a question of the task may be without images."""
        return self.task == questions.TASK.name


@dataclass(frozen=True)
class QuestionRows:
    """What was read of question files.

    Attributes:
      questions: in order.
      bad: of each row that is no question of a task, why: a sentence with its file and number.
      copies: names of rows that are copies of earlier ones, and left out.
      unnamed: how many have a rare name, without metrics of its own.
    """

    questions: tuple[ReleasedQuestion, ...]
    bad: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    unnamed: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about what is left out."""
        notes = []
        if self.bad:
            total, named = len(self.questions) + len(self.bad), " ".join(self.bad[:_NAMED])
            more = f" (and {len(self.bad) - _NAMED:,} more)" if len(self.bad) > _NAMED else ""
            notes.append(
                f"{len(self.bad):,} of {total:,} questions left out: {named.rstrip('.')}{more}"
            )
        if self.copies:
            count, first = len(self.copies), self.copies[0]
            notes.append(f"copies of questions left out: {count:,}, for example {first}")
        if self.unnamed:
            notes.append(
                f"{self.unnamed:,} questions have no metrics by their name in the column of tasks: "
                "it has too many names, and theirs are rare"
            )
        return tuple(notes)


class QuestionSource:
    """Questions of one or more files; images are read on access.

    Args:
      spec: the SPEC as the user wrote it.
      root: names are relative to this folder.
      rows: the questions; their tasks need no depth, as their images are complete.
      paths: where the paths in each file lead, by file.
      reading: how images are read.

    Raises:
      UserError: an image is outside of `root`, where that is known without reading a row's images.
    """

    has_depth = False
    has_distances = False

    def __init__(
        self,
        spec: str,
        root: str,
        rows: QuestionRows,
        paths: Mapping[str, RowPaths],
        reading: Reading = READING,
    ):
        self.spec, self.root, self.rows, self.reading = spec, root, rows, reading
        self.questions = rows.questions
        self._paths = dict(paths)
        self._columns = {q.column: RowGroups(q.column) for q in self.questions}
        for question in self.questions:
            for image in question.images or ():
                self._complete(question, image)

    def check_found(self, file: str) -> None:
        """Checks that some of the images are there that a file names by their paths alone.

        Raises:
          UserError: none of those that were looked for is, or they are where none may be.
        """
        question = next((q for q in self.questions if q.file == file and q.path), None)
        if question is None or self._paths[file].seen:
            return
        raise UserError(
            f"{file}: none of its images is there, for example "
            f"{self._complete(question, question.path)}: unpack them beside it, as the folder "
            f"{IMAGE_FOLDERS[0]}, or name the folder that holds both."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out of the files."""
        return self.rows.notes

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
        return {
            path
            for question in self.questions
            for image in (*(question.images or ()), question.path)
            if image and self._may_read(question, path := self._path(question, image))
        }

    def _path(self, question: ReleasedQuestion, image: str) -> str:
        return self._paths[question.file].complete(image)

    def _may_read(self, question: ReleasedQuestion, path: str) -> bool:
        allowed = self.reading.allow_outside_paths or is_inside(path, self.root)
        return allowed or self._paths[question.file].holds(path)

    def _complete(self, question: ReleasedQuestion, image: str) -> str:
        """The whole path of a question's image; raises `BadImage` where it may not be read."""
        path = self._path(question, image)
        if not self._may_read(question, path):
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
        name, listed = self.name(index), self._is_away(index)
        sizes = []
        for image in self._images(index):
            width, height = image_size(image, _image_name(image, name), listed)
            sizes.append((height, width))
        return sizes

    def __getitem__(self, index: int) -> Example:
        question, name, listed = self.questions[index], self.name(index), self._is_away(index)
        images = self._images(index)
        return Example(
            task=question.task,
            kind=question.kind,
            images=tuple(
                open_source_image(
                    image, _image_name(image, name), self.reading.transparency, listed
                )
                for image in images
            ),
            question=question.text,
            answer=question.answer,
            reason=f"The answer is {question.answer}.",
            truth={},
            source={
                "spec": self.spec,
                "record": name,
                "image": _image_name(images[0] if images else b"", name),
            },
            response=question.response,
        )

    def _is_away(self, index: int) -> bool:
        """Whether images are to be waited for: where some were, there is nothing now.

        An image that is missing by itself, or with its folder, is a bad one at once.
        """
        seen = self._paths[self.questions[index].file].seen
        return bool(seen) and is_away(seen)

    def _images(self, index: int) -> list[str | bytes]:
        """The question's images, encoded or as complete paths.

        Raises:
          BadImage: there is none, or their number is not that of the question's placeholders.
        """
        question = self.questions[index]
        cells = question.images
        if cells is None:
            found = self._columns[question.column].value(question.file, question.row)
            found = found if isinstance(found, list) else [] if found is None else [found]
            cells = [_cell(cell) for cell in found]
        if not (cells or question.may_lack_images) or not all(cells):
            raise BadImage(f"{self.name(index)}: its row has no image, or an empty one.")
        try:
            chat_content(question.text, {"image": len(cells), "video": 0})
        except UserError as error:
            raise BadImage(f"{self.name(index)}: {error}") from None
        return [self._complete(question, c) if isinstance(c, str) else c for c in cells]


def _cell(cell: dict[str, Any] | str | bytes | None) -> str | bytes:
    """An image of a parquet list: its encoded bytes, else its path; "" where there is neither."""
    if isinstance(cell, dict):
        return cell.get("bytes") or cell.get("path") or ""
    return cell or ""


def _image_name(image: str | bytes, name: str) -> str:
    return image if isinstance(image, str) else name
