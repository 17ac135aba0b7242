"""`predictions.jsonl` while it grows: resumable predictions of one evaluation."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import read_object
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
_PATH_KEY = "model"  # a path: the same weights may have moved since


class PredictionStore(Protocol):
    """Where `run_benchmark` keeps predictions: a `PredictionLog`, or a list in memory."""

    predictions: list[Prediction]

    def answered(
        self, questions: Sequence[Question], prompts: Sequence[BenchmarkPrompt], samples: int, /
    ) -> np.ndarray:
        """[n] bool, which of n questions have all their answers; the same on every process."""
        ...

    def add(self, predictions: Sequence[Prediction], /) -> None:
        """Appends predictions."""
        ...


class PredictionLog:
    """The predictions in a folder, which one process reads and writes.

    Args:
      folder: of `predictions.jsonl`; made with the first prediction.
      about: what decides the answers (model, benchmark, style, …), JSON types; stored in
        `asked.json`, and a folder with another content is refused.
      overwrite: remove what the folder holds of another evaluation.

    Raises:
      UserError: the folder holds predictions of another evaluation, or damaged ones.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], overwrite: bool = False):
        self.folder, self.path = Path(folder), Path(folder) / PREDICTIONS
        self.about = json.loads(json.dumps(about))
        self.predictions: list[Prediction] = []
        if not is_primary():
            return
        if overwrite:
            for name in (PREDICTIONS, SCORES, SUBMISSION, EVALUATION_FILE):
                (self.folder / name).unlink(missing_ok=True)
        self._check()
        self.predictions = self._read()

    def _check(self) -> None:
        """Refuses a folder whose predictions are not this evaluation's."""
        path, other = self.folder / EVALUATION_FILE, "choose another --out, or give --overwrite"
        if not path.is_file():
            found = [n for n in (PREDICTIONS, SCORES, SUBMISSION) if (self.folder / n).exists()]
            if found:
                raise UserError(f"{self.folder / found[0]} exists: {other}.")
            return
        before = read_object(path, other).values
        changed = [
            f"{key} {before.get(key)!r:.60}, not {self.about.get(key)!r:.60}"
            for key in sorted(before.keys() | self.about.keys())
            if key != _PATH_KEY and before.get(key) != self.about.get(key)
        ]
        if changed:
            raise UserError(
                f"{self.folder} holds answers of another evaluation ({'; '.join(changed)}): "
                f"{other}."
            )

    def _read(self) -> list[Prediction]:
        """The predictions so far; an incomplete last line is removed."""
        if not self.path.is_file():
            return []
        with self.path.open("rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
        return read_predictions(self.path) if whole else []

    def answered(
        self, questions: Sequence[Question], prompts: Sequence[BenchmarkPrompt], samples: int
    ) -> np.ndarray:
        """[n] bool, which questions have all their answers; the same on every process.

        A question with only some of its answers loses them, and is answered again.

        Args:
          questions, prompts: n questions and their prompts.
          samples: answers to each.

        Raises:
          UserError: a prediction is of none of these questions, or of another prompt.
        """
        index_of = {question.id: index for index, question in enumerate(questions)}
        count = np.zeros(len(index_of), np.int64)
        for prediction in self.predictions:
            index = index_of.get(prediction.id)
            if index is None or prediction.question != prompts[index].text:
                raise UserError(
                    f"{self.path} has an answer to {prediction.id!r}, which is not asked now "
                    "or with another prompt: give the same --data, choose another --out, or give "
                    "--overwrite."
                )
            count[index] += 1
        whole = [p for p in self.predictions if count[index_of[p.id]] == samples]
        if len(whole) < len(self.predictions):
            self.predictions = whole
            write_atomic(self.path, "".join(map(as_line, whole)))
        return all_gather(count == samples)[: len(count)]

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Appends predictions; they are in the file when this returns."""
        if not is_primary():
            return
        predictions = list(predictions)
        if not (self.folder / EVALUATION_FILE).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / EVALUATION_FILE, json.dumps(self.about, indent=1) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(as_line, predictions)))
        self.predictions += predictions
