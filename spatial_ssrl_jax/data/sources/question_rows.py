"""Rows of question files in the forms that people bring, read as one.

- `problem, answer, images`, as EasyR1 has it; `image` for a single one;
- `prompt` and `reward_model.ground_truth`, as verl has it;
- `instruction, input, output` (Alpaca), `conversations` (LLaVA, ShareGPT), `messages` (chat), whose
  answer is that of the response.

An answer, or a response's, is what its last box holds, or its `<answer>…</answer>`, or what follows
its thought, which is all of it where there is none.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spatial_ssrl_jax.common.reading import QuestionFields
from spatial_ssrl_jax.common.text import shown
from spatial_ssrl_jax.tasks.answers import last_box
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

_NAMES = {
    "problem": ("problem", "question", "prompt", "query", "instruction"),
    "answer": ("answer", "reward_model.ground_truth", "ground_truth", "solution"),
    "images": ("images", "image"),
    "response": ("response", "output"),
    "task": ("task", "data_source"),
}
_TURNS = ("messages", "conversations", "prompt")
_ROLES = {"human": "user", "gpt": "assistant"}
_MARK, _VIDEO = re.compile(r"<image\d*>"), "<video>"
_TOKEN = re.compile(r"<\|(?:im|image|video|vision)_\w+\|>")  # of a chat template
_ANSWER = re.compile(r"<answer>(.*)</answer>", re.DOTALL)


class BadRow(Exception):
    """A row that is no question; the message says why, without file and number."""


@dataclass(frozen=True)
class QuestionRow:
    """One question.

    Attributes:
      text: with `<image>` or `<image2>` where images go; without any mark all come first.
      answer: the right one.
      response: a whole response to learn; "" without one.
      task: a name for metrics; "" without one.
      images: their paths; None where the row has them in a column that is read later.
    """

    text: str
    answer: str
    response: str
    task: str
    images: tuple[str, ...] | None


def text_columns(names: Sequence[str], fields: QuestionFields) -> list[str]:
    """The columns that `parse_row` reads of those that a file has, without images."""
    wanted = {name for key in _NAMES for name in _names(key, fields)} | {"input", *_TURNS}
    wanted -= set(_names("images", fields))
    first = {name.partition(".")[0] for name in wanted}
    return [name for name in names if name in first]


def image_column(names: Sequence[str], fields: QuestionFields) -> str | None:
    """The column of the images; None where a file has none.

    Raises:
      BadRow: `fields` names one that is not there.
    """
    if fields.images and fields.images not in names:
        raise BadRow(f"it has no column {fields.images}, only {', '.join(names)}")
    return next((name for name in _names("images", fields) if name in names), None)


def parse_row(row: Mapping[str, Any], fields: QuestionFields, images_later: bool) -> QuestionRow:
    """Reads a row.

    Args:
      row: its values by column.
      fields: names of columns that are not the usual ones.
      images_later: the row's images are in a column that `row` does not hold.

    Raises:
      BadRow: it has no question, no answer, or other images than its question has marks for.
    """
    text, response, images = _problem(row, fields)
    if _VIDEO in text:
        raise BadRow("it asks about a video; only images are supported")
    if token := _TOKEN.search(text):
        raise BadRow(f"its question holds {token[0]}, a token of chat templates")
    text = text.replace(FORMAT_PROMPT, "").strip()
    if not _MARK.sub("", text).strip():
        raise BadRow("its question is empty")
    answer = _answer_of(_text(row, "answer", fields)) or _answer_of(response)
    if not answer:
        raise BadRow("it has no answer")
    task = re.sub(r"\W+", "_", _text(row, "task", fields))
    paths = None
    if not images_later:
        cells = _value(row, "images", fields)
        cells = cells if isinstance(cells, (list, tuple)) else [] if cells is None else [cells]
        paths = (*images, *map(_path, cells))
        check_marks(text, len(paths))
    return QuestionRow(text, answer, response, task, paths)


def check_marks(text: str, images: int) -> None:
    """Raises `BadRow` where a question has marks for more or fewer images than it has."""
    marks = len(_MARK.findall(text))
    if marks not in (0, images):
        raise BadRow(f"its question has marks for {marks} images, but it has {images}")


def _problem(row: Mapping[str, Any], fields: QuestionFields) -> tuple[str, str, tuple[str, ...]]:
    """The question, the response and the images of content parts."""
    for name in _TURNS:
        if isinstance(row.get(name), (list, tuple)) and not fields.problem:
            text, response, images = _turns(row[name])
            return text, response or _text(row, "response", fields), images
    text = _text(row, "problem", fields)
    if not fields.problem and "instruction" in row:
        text = "\n".join(filter(None, (text, _plain(row.get("input"), "input"))))
    return text, _text(row, "response", fields), ()


def _turns(turns: Sequence[Any]) -> tuple[str, str, tuple[str, ...]]:
    """The user's text, the assistant's and the images of a conversation with one exchange.

    What the system says comes before the question.
    """
    said: dict[str, str] = {}
    images: tuple[str, ...] = ()
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise BadRow(f"its conversation has a turn that is {shown(turn)}")
        role = turn.get("role", turn.get("from"))
        role = _ROLES.get(role, role) if isinstance(role, str) else role
        if role not in ("system", "user", "assistant"):
            raise BadRow(f"its conversation has the role {shown(role)}")
        if role in said:
            raise BadRow("its conversation has several exchanges; only one is supported")
        said[role], more = _content(turn.get("content", turn.get("value")))
        images += more
    text = "\n".join(filter(None, (said.get("system", ""), said.get("user", ""))))
    return text if "user" in said else "", said.get("assistant", ""), images


def _content(content: Any) -> tuple[str, tuple[str, ...]]:
    """The text and the images of a turn's content: text, or a list of parts."""
    if not isinstance(content, (list, tuple)):
        return _plain(content, "its turn"), ()
    text, images = "", []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            text += _plain(part.get("text"), "its turn")
        elif kind in ("image", "image_url"):
            text += "<image>"
            found = next((part[key] for key in ("image", "image_url", "path") if part.get(key)), "")
            images += [_path(found)] if found else []
        else:
            raise BadRow(f"its turn has a part {shown(part)}")
    return text, tuple(images)


def _answer_of(text: str) -> str:
    """What a text answers: its last box, its `<answer>`, or else what follows its thought."""
    text, box = text.rpartition("</think>")[2], last_box(text)
    tagged = _ANSWER.search(text)
    return (box if box is not None else tagged[1] if tagged else text).strip()


def _path(cell: Any) -> str:
    """The path that an image's cell holds."""
    if isinstance(cell, Mapping):
        cell = cell.get("path") or cell.get("url") or ""
    if not isinstance(cell, str) or not cell:
        raise BadRow(f"its image is {shown(cell)}; expected a path")
    path = cell.removeprefix("file://")
    if path.startswith("data:") or "://" in path:
        raise BadRow(f"its image is {shown(cell)}; expected the path of a file")
    return path


def _names(key: str, fields: QuestionFields) -> tuple[str, ...]:
    """The columns that may hold a field: the one that is named, or else the usual ones."""
    named = getattr(fields, key)
    return (named,) if named else _NAMES[key]


def _value(row: Mapping[str, Any], key: str, fields: QuestionFields) -> Any:
    """The value of the first column that has one."""
    for name in _names(key, fields):
        value: Any = row
        for step in name.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _text(row: Mapping[str, Any], key: str, fields: QuestionFields) -> str:
    return _plain(_value(row, key, fields), f"its {key}")


def _plain(value: Any, what: str) -> str:
    """Text or a number as text, a whole one without a point; "" for nothing, and for NaN."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (bool, int, float)):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{what} is {shown(value)}; expected text")
    return value.strip()
