"""The pretext tasks as a benchmark: accuracy by task and kind, each beside what guessing gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.eval.benchmarks import prompts as protocol
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Judgement, Prediction, Question
from spatial_ssrl_jax.eval.scoring import answers
from spatial_ssrl_jax.eval.scoring.scores import Cell, Metric, mean
from spatial_ssrl_jax.tasks import TASKS_BY_NAME
from spatial_ssrl_jax.tasks.answers import last_box
from spatial_ssrl_jax.tasks.example import Example
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

CHANCE = "chance/"  # in the extra scores, before a task or category


@dataclass(frozen=True)
class TaskImage:
    """An image that a task drew.

    Attributes:
      name: what errors call it.
      image: [H, W, 3] uint8, RGB.
    """

    name: str
    image: np.ndarray

    def open(self) -> np.ndarray:
        return self.image

    def size(self) -> tuple[int, int]:
        return self.image.shape[:2]


def question_of(example: Example, number: int) -> Question:
    """An example as a question.

    Args:
      example: of any task.
      number: its place among those of its task.
    """
    task, kind = example.task, example.kind
    chance = TASKS_BY_NAME[task].chance
    return Question(
        id=f"{task}-{number}",
        benchmark=PRETEXT.name,
        category=task if kind == task else f"{task}/{kind}",
        text=example.question,
        target=example.answer,
        pictures=tuple(
            TaskImage(f"image {i} of {task}-{number}", image)
            for i, image in enumerate(example.images, 1)
        ),
        meta={
            "task": task,
            "kind": kind,
            "source": example.source,
            "truth": example.truth,
            "chance": None if chance is None else chance(example.answer),
        },
    )


def judge(record: Prediction) -> Judgement:
    """Right when the box holds the answer to the letter, as the training's reward has it; asked
    without the format prompt, a short answer by itself will do."""
    found = last_box(record.response)
    if found is None and not record.question.endswith(FORMAT_PROMPT):
        answer = answers.final_answer(record.response)
        found = answer and answer.text
    return Judgement(found or None, float(found == record.target))


def _cells(records: Sequence[Prediction]) -> list[Cell]:
    """Each task counts alike; questions about one image are drawn together."""
    return [(_picture(record), record.meta["task"], record.score) for record in records]


def _picture(record: Prediction) -> tuple[str, ...]:
    source = record.meta["source"]
    return source.get("spec", ""), source.get("record", record.id)


def _extra(records: Sequence[Prediction]) -> dict[str, float]:
    """Accuracy of each task; and what guessing gives, of all, each task and each category."""
    tasks = sorted({record.meta["task"] for record in records})
    found = {task: mean(c for c in _cells(records) if c[1] == task) for task in tasks}
    chances: dict[str, list[float | None]] = {}
    for record in records:
        for name in {record.meta["task"], record.category}:
            chances.setdefault(name, []).append(record.meta["chance"])
    for name, known in sorted(chances.items()):
        if None not in known:
            found[CHANCE + name] = 100 * float(np.mean(known))
    if all(CHANCE + task in found for task in tasks):
        found["chance"] = float(np.mean([found[CHANCE + task] for task in tasks]))
    return found


def ask(question: Question, style: Style) -> BenchmarkPrompt:
    return BenchmarkPrompt(protocol.in_style(question.text, style), question.pictures)


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
