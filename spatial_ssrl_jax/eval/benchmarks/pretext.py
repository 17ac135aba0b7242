"""The pretext tasks as a benchmark: accuracy by task and kind, each with its chance level."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.eval.benchmarks import prompts
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec
from spatial_ssrl_jax.eval.questions import (
    BenchmarkPrompt,
    Judgement,
    Prediction,
    Question,
    score_of,
)
from spatial_ssrl_jax.eval.scoring import extract
from spatial_ssrl_jax.eval.scoring.scores import Cell, Metric, mean
from spatial_ssrl_jax.tasks import TASKS_BY_NAME
from spatial_ssrl_jax.tasks.answers import last_box
from spatial_ssrl_jax.tasks.example import Example
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

CHANCE = "chance/"  # in the extra scores, before a task or category


@dataclass(frozen=True)
class TaskImage:
    """An image that a task made.

    Attributes:
      name: the image in error messages.
      image: [H, W, 3] uint8, RGB.
    """

    name: str
    image: np.ndarray

    def open(self) -> np.ndarray:
        return self.image

    def size(self) -> tuple[int, int]:
        height, width = self.image.shape[:2]
        return height, width


def question_of(example: Example, number: int) -> Question:
    """An example as a question.

    Args:
      example: of any task.
      number: its index among the examples of its task.
    """
    task, kind = example.task, example.kind
    known = TASKS_BY_NAME.get(task)  # not of questions of one's own
    chance = known.chance if known else None
    return Question(
        id=f"{task}-{number}",
        benchmark=PRETEXT.name,
        category=f"{task}/{kind}" if kind not in ("", task) else task,
        text=example.question,
        target=example.answer,
        images=tuple(
            TaskImage(f"image {i} of {task}-{number}", image)
            for i, image in enumerate(example.images, 1)
        ),
        meta={
            "task": task,
            "kind": kind,
            "source": example.source,
            "truth": example.truth,
            "chance": None if chance is None else chance(example),
        },
    )


def judge(prediction: Prediction) -> Judgement:
    """Right when the box holds exactly the answer, as in the training reward; without the format
    prompt a short answer without a box counts too."""
    found = last_box(prediction.response)
    if found is None and not prediction.question.endswith(FORMAT_PROMPT):
        answer = extract.final_answer(prediction.response)
        found = answer and answer.text
    return Judgement(found or None, float(found == prediction.target))


def _cells(predictions: Sequence[Prediction]) -> list[Cell]:
    """Tasks have equal weights; questions about one image are drawn together."""
    return [
        (_image_of(prediction), _task_of(prediction), score_of(prediction))
        for prediction in predictions
    ]


def _image_of(prediction: Prediction) -> tuple[str, ...]:
    source = prediction.meta.get("source", {})
    return str(source.get("spec", "")), str(source.get("record", prediction.id))


def _task_of(prediction: Prediction) -> str:
    """The task of an answer, which other tools' files may give as the category alone."""
    return prediction.meta.get("task") or prediction.category.partition("/")[0]


def _extra(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Accuracy of each task; and the chance level of all, each task and each category."""
    tasks = sorted({_task_of(prediction) for prediction in predictions})
    found = {task: mean(c for c in _cells(predictions) if c[1] == task) for task in tasks}
    chances: dict[str, list[float | None]] = {}
    for prediction in predictions:
        for name in {_task_of(prediction), prediction.category}:
            chances.setdefault(name, []).append(prediction.meta.get("chance"))
    for name, values in sorted(chances.items()):
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            found[CHANCE + name] = 100 * float(np.mean(known))
    if all(CHANCE + task in found for task in tasks):
        found["chance"] = float(np.mean([found[CHANCE + task] for task in tasks]))
    return found


def ask(question: Question, style: Style) -> BenchmarkPrompt:
    return BenchmarkPrompt(prompts.in_style(question.text, style), question.images)


PRETEXT = BenchmarkSpec(
    name="pretext",
    title="pretext tasks",
    files=(),
    columns=(),
    parse=None,
    ask=ask,
    metric=Metric(judge, _cells, extra=_extra),
    pixels=None,
)
