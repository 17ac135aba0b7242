"""Reading and writing `predictions.jsonl`, `scores.json` and MMBench's submission."""

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import JsonObject, as_object, parse_json
from spatial_ssrl_jax.common.paths import check_regular, write_atomic
from spatial_ssrl_jax.eval.questions import SAMPLE, Prediction
from spatial_ssrl_jax.eval.scoring.scores import Scores

PREDICTIONS, SCORES, SUBMISSION = "predictions.jsonl", "scores.json", "submission.tsv"
TABLE = "table.json"
_NEEDED = ("id", "benchmark", "category", "question", "target", "response")
_FIX = "fix the line, or leave it out"
_META: dict[str, type] = {  # of all benchmarks
    **dict.fromkeys(("qid", "set_id", "figure_id", "question_id", "subcategory"), str),
    **dict.fromkeys(("task", "kind", "split", "text", "dropped"), str),
    **dict.fromkeys(("options", "source", "truth"), dict),
    **dict.fromkeys(("group", SAMPLE), int),
    "chance": float,
}
_FIELDS = tuple(field.name for field in dataclasses.fields(Prediction))


def read_predictions(path: Path) -> list[Prediction]:
    """Predictions of a file, scored or not, without the fields that scoring writes.

    Raises:
      UserError: no such file, or a line that is no prediction; it names the line.
    """
    check_regular(path, "check the path")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path.") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} holds no prediction.")
    return [_prediction(f"line {number} of {path}", line) for number, line in numbered]


def predictions_in(path: Path) -> Path:
    """The path itself, or `predictions.jsonl` in a folder; raises `UserError` where it has none."""
    if not path.is_dir():
        return path
    if (path / PREDICTIONS).is_file():
        return path / PREDICTIONS
    below = sorted(found.parent.name for found in path.glob(f"*/{PREDICTIONS}"))
    here = f"; there is one in each of {', '.join(below)} below it" if below else ""
    raise UserError(f"{path} has no {PREDICTIONS}{here}: give the folder that has it.")


def _prediction(name: str, line: bytes) -> Prediction:
    line_of_file = as_object(parse_json(line, name, _FIX), name, _FIX)
    values = line_of_file.values
    missing = [field for field in _NEEDED if field not in values]
    if missing:
        raise UserError(f"{name} has no {', '.join(missing)}: needed are {', '.join(_NEEDED)}.")
    target = values["target"]
    if isinstance(target, list):
        target = list(line_of_file.items("target", str))
    return Prediction(
        id=str(values["id"]),
        benchmark=str(values["benchmark"]),
        category=str(values["category"] or "all"),
        question=str(values["question"]),
        target=target if isinstance(target, list | None) else str(target),
        response=line_of_file.get("response", str),
        meta=_meta(line_of_file.section("meta")),
    )


def _meta(meta: JsonObject) -> dict[str, Any]:
    """The meta of a prediction; raises `UserError` for a type that scoring does not expect."""
    for key, kind in _META.items():
        meta.find(key, kind)
    options = meta.section("options")
    for letter in options.values:
        options.get(letter, str)
    return dict(meta.values)


def as_line(prediction: Prediction) -> str:
    """A prediction as a line of `predictions.jsonl`, with its line break."""
    values = {field: getattr(prediction, field) for field in _FIELDS}
    return json.dumps(values, ensure_ascii=False) + "\n"


def write_results(
    folder: epath.Path | Path, predictions: Iterable[Prediction], scores: Scores
) -> None:
    """Writes `predictions.jsonl` and `scores.json` into a folder, each whole or not at all."""
    write_atomic(folder / PREDICTIONS, "".join(map(as_line, predictions)))
    write_atomic(folder / SCORES, json.dumps(scores.as_json(), indent=1) + "\n")


def submit(predictions: Sequence[Prediction], folder: Path, say: Callable[[str], None]) -> None:
    """Writes `submission.tsv` for a benchmark's server, with the first sample of each question."""
    first = [prediction for prediction in predictions if prediction.meta.get(SAMPLE, 1) == 1]
    write_submission(folder / SUBMISSION, first)
    say(f"{folder / SUBMISSION}: {len(first)} answers without a public target, not scored")


def write_submission(path: Path, predictions: Iterable[Prediction]) -> None:
    """Writes responses as MMBench's server reads them, one row a rotation (convert it to xlsx)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "question", "A", "B", "C", "D", "prediction"])
        for prediction in predictions:
            options = prediction.meta.get("options") or {}
            text = prediction.meta.get("text", prediction.question)
            letters = [options.get(letter, "") for letter in "ABCD"]
            writer.writerow([prediction.id, text, *letters, prediction.response])
