"""Lengths of the tasks' prompts and SFT responses, without decoding every image."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.processor import Processor, PromptSize
from spatial_ssrl_jax.data.sources import AnySource, open_source
from spatial_ssrl_jax.data.stand_ins import own_source
from spatial_ssrl_jax.data.task_sources import (
    ImageExampleMaker,
    TaskSource,
    task_sources,
    tasks_for,
    trained_tasks,
)
from spatial_ssrl_jax.tasks.example import Reject, Size, Task, TaskSettings
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT, response_text

_EXAMPLES = 24  # examples a task whose text is tokenized
_TRIES = 20 * _EXAMPLES
_RECORDS = 1000  # records of a source whose sizes are read


@dataclass(frozen=True)
class TaskLengths:
    """One task's lengths.

    Attributes:
      weight: of the task in the mixture.
      shares: [n] float64 fraction of the task's examples that each row of `images` stands for.
      images: [n, 2] int64 tokens and patches of the images of one example of each record.
      text: [m] int64 tokens of the rest of the prompt, of a few examples.
      responses: [m] int64 tokens of their SFT responses.
    """

    weight: float
    shares: np.ndarray
    images: np.ndarray
    text: np.ndarray
    responses: np.ndarray


@dataclass(frozen=True)
class Lengths:
    """The lengths of a mixture of tasks.

    Attributes:
      spec: what was measured.
      tasks: the trained ones.
    """

    spec: str
    tasks: tuple[TaskLengths, ...]

    @classmethod
    def open(cls, config: Config, processor: Processor, spec: str | None = None) -> "Lengths":
        """Measures the config's trained tasks.

        Sizes of images are those of every record, or of many, by `Processor.measure` alone; only a
        few examples a task are built, for the text of their questions and responses.

        Args:
          config: its tasks are measured.
          processor: measures prompts.
          spec: where images come from; None takes the config's source, or where that is not here
            built-in scenes of the sizes that it has.

        Raises:
          UserError: the source has no image for a task, or no example of it.
        """
        opened = open_source(spec, config.data.reading, config.all_tasks) if spec else None
        source = own_source(config) if opened is None else opened
        tasks = tasks_for(source, config.task_settings)
        found = [_measure(task, tasks[task], source, processor) for task in trained_tasks(tasks)]
        return cls(source.spec, tuple(found))

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws prompts with responses.

        Returns:
          [count, 2] int64 tokens of prompts and patches of their images; and [count] tokens of
          their responses.
        """
        weights = np.array([task.weight for task in self.tasks])
        sizes, responses = np.zeros((count, 2), np.int64), np.zeros(count, np.int64)
        drawn = rng.choice(len(self.tasks), count, p=weights / weights.sum())
        for number, task in enumerate(self.tasks):
            mine = np.flatnonzero(drawn == number)
            example = rng.integers(len(task.text), size=len(mine))
            images = task.images[rng.choice(len(task.images), len(mine), p=task.shares)]
            sizes[mine] = images
            sizes[mine, 0] += task.text[example]
            responses[mine] = task.responses[example]
        return sizes, responses


def _measure(
    task: Task[Any], settings: TaskSettings, source: AnySource, processor: Processor
) -> TaskLengths:
    found = [
        part
        for part in task_sources(source, range(len(source)), task, settings)
        if isinstance(part.maker, ImageExampleMaker)
    ]
    if not found:
        raise UserError(f"{source.spec} has no images for {task.name}: give another --source.")

    @cache
    def measure(sizes: tuple[Size, ...]) -> PromptSize:
        return processor.measure(sizes)

    rng, images, shares = np.random.default_rng(0), [], []
    for part in found:
        count = min(len(part.indices), _RECORDS)
        chosen = rng.choice(part.indices, count, replace=False).tolist()
        images += [measure(tuple(part.maker.sizes(i))) for i in chosen]
        shares += [part.weight / count] * count
    text, responses = _text_lengths(found, source.spec, processor)
    return TaskLengths(
        settings.weight,
        np.array(shares) / sum(shares),
        np.array([(i.tokens, i.patches) for i in images]),
        text,
        responses,
    )


def _text_lengths(
    found: list[TaskSource], spec: str, processor: Processor
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the text of a few examples' prompts, and of their SFT responses."""
    rng, text, responses = np.random.default_rng(0), [], []
    for number in range(_TRIES):
        part = found[number % len(found)]
        try:
            example = part.maker(part.indices[number % len(part.indices)], rng)
        except Reject:
            continue
        sizes = [image.shape[:2] for image in example.images]
        whole = processor.measure(sizes, f"{example.question} {FORMAT_PROMPT}").tokens
        text.append(whole - processor.measure(sizes).tokens)
        response = response_text(example.reason, example.answer)
        responses.append(len(processor.encode_response(response)))
        if len(text) == _EXAMPLES:
            break
    if not text:
        raise UserError(
            f"{spec} has no {found[0].maker.task} example in {_TRIES} tries: use other images."
        )
    return np.array(text), np.array(responses)
