"""Answers of other tools, row by row: VLMEvalKit's prediction tables and lmms-eval's samples."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import JsonObject, as_object, parse_json
from spatial_ssrl_jax.common.paths import check_regular
from spatial_ssrl_jax.eval.benchmarks.images import cell_items
from spatial_ssrl_jax.eval.benchmarks.question_files import QuestionRow, read_rows
from spatial_ssrl_jax.eval.benchmarks.registry import SPECS
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec
from spatial_ssrl_jax.eval.benchmarks.xlsx import LONGEST_CELL
from spatial_ssrl_jax.eval.questions import Question, Target

KIT, LMMS = "VLMEvalKit", "lmms-eval"
_TABLES = "give its table of predictions, MODEL_DATASET.xlsx, .tsv or .json"
_REFUSED = {
    ".pkl": "is a pickle, which runs code when it is read",
    ".csv": "is one of VLMEvalKit's tables of scores, which hold no answers",
}
_ANSWER, _THOUGHTS, _JUDGED = "prediction", "thinking", "hit"  # columns
_FAILED = "Failed to obtain answer"  # what VLMEvalKit writes where a model failed
_ROW = "copy the file again"


@dataclass(frozen=True)
class ToolAnswer:
    """One row of another tool's file.

    Attributes:
      name: the row in error messages.
      keys: ids that its question may have here.
      number: of its question among those of its file, from 0.
      question: as the row has it, without images; None where the row lacks a part of it.
      asked: the question, or lmms-eval's prompt that holds it; "" where the row has neither.
      target: the right answer, likewise.
      responses: one for each sample, as the model wrote them.
    """

    name: str
    keys: tuple[str, ...]
    number: int
    question: Question | None
    asked: str
    target: str
    responses: tuple[str, ...]


@dataclass(frozen=True)
class ToolAnswers:
    """The answers in one file of another tool.

    Attributes:
      path: the file.
      tool: its name.
      spec: of the benchmark.
      task: the file's name, letters and digits alone; it ends like "blinkartstyle".
      rows: in the order of the file.
      bad_rows: why rows have no whole question, in a table that holds the questions too.
      counts: how many answers there are of kinds that are worth knowing.
    """

    path: Path
    tool: str
    spec: BenchmarkSpec
    task: str
    rows: list[ToolAnswer]
    bad_rows: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


def tool_of(path: Path) -> str | None:
    """Which tool wrote a file of answers; None where it is no other's.

    Raises:
      UserError: it is a file of VLMEvalKit without answers, or one that is not safe to read.
    """
    kind = path.suffix.lower()
    if kind in _REFUSED:
        raise UserError(f"{path} {_REFUSED[kind]}: {_TABLES}.")
    if kind in (".xlsx", ".tsv"):
        return KIT
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = next((line for line in file if line.strip()), b"")
    if kind == ".json" and start.startswith(b"["):
        return KIT
    try:
        row = json.loads(start)
    except (ValueError, RecursionError):
        return None
    return LMMS if isinstance(row, dict) and "doc_id" in row else None


def read_tool_answers(path: Path, tool: str, benchmark: str | None) -> ToolAnswers:
    """Reads a file of another tool.

    Args:
      path: the file.
      tool: see `tool_of`.
      benchmark: whose questions it answers; None takes it from the file's name.

    Raises:
      UserError: it is damaged, has no answers, or does not say of which benchmark.
    """
    check_regular(path, "check the path")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    task = plain(path.stem)
    spec = _spec(path, task, benchmark)
    return _read_table(path, spec, task) if tool == KIT else _read_samples(path, spec, task)


def plain(text: str) -> str:
    """Letters and digits alone, in lower case."""
    return "".join(filter(str.isalnum, text.casefold()))


def _spec(path: Path, task: str, benchmark: str | None) -> BenchmarkSpec:
    """The benchmark that is given, or the one that ends last in the name: a model comes first."""
    if benchmark is None:
        places = {name: task.rfind(plain(name)) + len(plain(name)) for name in SPECS}
        named = [name for name in SPECS if plain(name) in task]
        if not named:
            raise UserError(
                f"the name of {path} does not say of which benchmark it is: give --benchmark="
                f"NAME, one of {', '.join(SPECS)}."
            )
        benchmark = max(named, key=lambda name: places[name])
    if benchmark not in SPECS:
        raise UserError(f"--benchmark={benchmark} is none of {', '.join(SPECS)}: give one.")
    return SPECS[benchmark]


def _read_table(path: Path, spec: BenchmarkSpec, task: str) -> ToolAnswers:
    """VLMEvalKit's table: a row of the question file, without images, with the prediction."""
    rows = read_rows(path, path.parent)
    columns = set(rows[0].values)
    if _ANSWER not in columns:
        raise UserError(
            f"{path} has no column {_ANSWER!r} (but {', '.join(sorted(columns)[:8])}): {_TABLES}."
        )
    if _JUDGED in columns:
        raise UserError(
            f"{path} is VLMEvalKit's table of judged answers, which may lack some: {_TABLES}."
        )
    parsed = [(row, *_question(spec, row)) for row in rows]
    asked = [(row, question) for row, question, reason in parsed if question or reason]
    found = [_of_table(row, question, number) for number, (row, question) in enumerate(asked)]
    cells = [row.responses[0] for row in found]
    counts = {
        "rows that are not asked": len(rows) - len(asked),
        "empty answers, which are wrong": sum(not cell.strip() for cell in cells),
        f"answers that say {_FAILED!r}, which are wrong": sum(_FAILED in cell for cell in cells),
        "answers that fill their cell, and may lack their end": sum(
            len(cell) >= LONGEST_CELL for cell in cells if path.suffix.lower() == ".xlsx"
        ),
    }
    bad = tuple(reason for *_, reason in parsed if reason)
    return ToolAnswers(path, KIT, spec, task, found, bad, counts)


def _question(spec: BenchmarkSpec, row: QuestionRow) -> tuple[Question | None, str]:
    """The row's question without images, and "", or None and why it is bad, "" where not asked."""
    assert spec.parse is not None
    try:
        question = spec.parse(replace(row, media=False))
    except UserError as reason:
        return None, str(reason)
    return question, ""


def _of_table(row: QuestionRow, question: Question | None, number: int) -> ToolAnswer:
    response, thoughts = str(row.get(_ANSWER)), str(row.get(_THOUGHTS))
    if thoughts:  # SPLIT_THINK of VLMEvalKit takes them apart
        response = f"<think>{thoughts.removesuffix('</think>')}</think>{response}"
    return ToolAnswer(
        name=row.name,
        keys=tuple(filter(None, (question.id if question else "", str(row.get("index")).strip()))),
        number=number,
        question=question,
        asked=str(row.get("question")),
        target=_one(question.target if question else None),
        responses=(response,),
    )


def _one(target: Target) -> str:
    """One of the right answers; lmms-eval spells lists out, and may have True and False."""
    if isinstance(target, str) and target.startswith("["):
        with suppress(ValueError):
            target = cell_items(target)
    one = target[0] if isinstance(target, list) and target else target
    return {"True": "Yes", "False": "No"}.get(str(one), str(one or ""))


def _read_samples(path: Path, spec: BenchmarkSpec, task: str) -> ToolAnswers:
    """lmms-eval's samples: a JSON object a line, which names its question by its number."""
    lines = enumerate(path.read_bytes().split(b"\n"), 1)
    named = [(f"line {i} of {path.name}", line) for i, line in lines if line.strip()]
    rows = [as_object(parse_json(line, name, _ROW), name, _ROW) for name, line in named]
    return ToolAnswers(path, LMMS, spec, task, [_of_sample(path, spec, row) for row in rows])


def _of_sample(path: Path, spec: BenchmarkSpec, row: JsonObject) -> ToolAnswer:
    number, prompt = row.get("doc_id", int), row.values.get("input")
    # A release logs the question's row as `doc`; others have parts of it in their metrics.
    parts = [value for value in row.values.values() if isinstance(value, dict)]
    names = [str(part[key]) for part in parts for key in ("index", "qid") if key in part]
    question = _question_among(path, spec, parts, number)
    target = question.target if question else str(row.values.get("target") or "")
    return ToolAnswer(
        name=row.name,
        keys=tuple(dict.fromkeys([*([question.id] if question else []), *names])),
        number=number,
        question=question,
        asked=prompt if isinstance(prompt, str) else "",
        target=_one(target),
        responses=_responses(row),
    )


def _question_among(
    path: Path, spec: BenchmarkSpec, parts: Sequence[Mapping[str, Any]], number: int
) -> Question | None:
    found = (_question(spec, QuestionRow(part, "", path, number))[0] for part in parts)
    return next((question for question in found if question is not None), None)


def _responses(row: JsonObject) -> tuple[str, ...]:
    """What the model wrote: `resps`, which is left out where the filters changed nothing.

    Releases differ in how they are nested: "a", ["a"], [["a"]], and [["a", "b"]] for two samples.
    """
    key = "resps" if row.values.get("resps") is not None else "filtered_resps"
    value = row.values.get(key)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    if not texts or len(texts) < len(values):
        raise UserError(
            f"{row.name} has no answer in words in {key!r}: score a task of lmms-eval that "
            "generates text, with --log_samples."
        )
    return tuple(texts)
