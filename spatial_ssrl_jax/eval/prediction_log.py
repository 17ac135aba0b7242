"""`predictions.jsonl` while it grows: who answers what, and what was answered before a stop."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.paths import write_atomic
from spatial_ssrl_jax.eval.predictions import (
    PREDICTIONS,
    SCORES,
    SUBMISSION,
    as_line,
    read_predictions,
)
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Prediction, Question
from spatial_ssrl_jax.parallel.collectives import all_gather, is_primary

EVALUATION_FILE = "asked.json"
_PLACE = "model"  # where the model is says nothing about which it is


class PredictionLog:
    """The answers in a folder, which one process reads and writes.

    Args:
      folder: where they are kept; made when the first one comes.
      about: what decides the answers (model, benchmark, style, …), JSON types; it is in
        `asked.json`, and answers to anything else are refused.
      overwrite: what the folder holds of another evaluation may go.

    Raises:
      UserError: the folder holds other answers, or damaged ones.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], overwrite: bool = False):
        self.folder, self.path = Path(folder), Path(folder) / PREDICTIONS
        self.about = json.loads(json.dumps(about))
        self.records: list[Prediction] = []
        if not is_primary():
            return
        if overwrite:
            for name in (PREDICTIONS, SCORES, SUBMISSION, EVALUATION_FILE):
                (self.folder / name).unlink(missing_ok=True)
        self._check()
        self.records = self._read()

    def _check(self) -> None:
        """Refuses a folder whose answers are not this evaluation's."""
        path, other = self.folder / EVALUATION_FILE, "choose another --out, or give --overwrite"
        if not path.is_file():
            found = [n for n in (PREDICTIONS, SCORES, SUBMISSION) if (self.folder / n).exists()]
            if found:
                raise UserError(f"{self.folder / found[0]} exists: {other}.")
            return
        try:
            before = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): {other}.") from None
        changed = [
            f"{key} {before.get(key)!r}, not {self.about.get(key)!r}"
            for key in sorted(before.keys() | self.about.keys())
            if key != _PLACE and before.get(key) != self.about.get(key)
        ]
        if changed:
            raise UserError(
                f"{self.folder} holds answers of another evaluation ({'; '.join(changed)}): "
                f"{other}."
            )

    def _read(self) -> list[Prediction]:
        """What was answered so far; a last line that was cut off goes."""
        if not self.path.is_file():
            return []
        with self.path.open("rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
        return read_predictions(self.path) if whole else []

    def answered(
        self, questions: Sequence[Question], asked: Sequence[BenchmarkPrompt], samples: int
    ) -> np.ndarray:
        """[n] bool, which questions have all their answers; the same on every process.

        Where a stop left some of a question's answers, they go: it is asked again.

        Args:
          questions, asked: n questions, and in which words.
          samples: answers to each.

        Raises:
          UserError: an answer is to a question that is not among them, or in other words.
        """
        places = {question.id: place for place, question in enumerate(questions)}
        count = np.zeros(len(places), np.int64)
        for record in self.records:
            place = places.get(record.id)
            if place is None or record.question != asked[place].text:
                raise UserError(
                    f"{self.path} has an answer to {record.id!r}, which is not asked now or in "
                    "other words: give the same --data, choose another --out, or give --overwrite."
                )
            count[place] += 1
        whole = [r for r in self.records if count[places[r.id]] == samples]
        if len(whole) < len(self.records):
            self.records = whole
            write_atomic(self.path, "".join(map(as_line, whole)))
        return all_gather(count == samples)[: len(count)]

    def add(self, records: Iterable[Prediction]) -> None:
        """Appends answers; they are in the file when this returns."""
        if not is_primary():
            return
        records = list(records)
        if not (self.folder / EVALUATION_FILE).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / EVALUATION_FILE, json.dumps(self.about, indent=1) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(as_line, records)))
        self.records += records
