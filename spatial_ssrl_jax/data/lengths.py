"""How long the tasks' prompts and cold-start responses are, without decoding every image."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.items import ImageExampleMaker, TaskSource, task_sources
from spatial_ssrl_jax.data.processor import Processor, PromptSize
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.example import Reject, Task
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT, response_text

_MADE = 24  # examples a task that are made for their words
_TRIES = 20 * _MADE
_DEPTH, _PLAIN = "scenes:9:1024x768", "scenes:9:640x480"  # DIODE's size, and COCO's commonest


@dataclass(frozen=True)
class TaskLengths:
    """One task's lengths.

    Attributes:
      weight: its share among the tasks.
      images: [n, 2] tokens and vision windows of the images of one example of each record.
      words: [m] tokens of the rest of the prompt, of examples that were made.
      responses: [m] tokens of their cold-start responses.
    """

    weight: float
    pictures: np.ndarray
    words: np.ndarray
    responses: np.ndarray


@dataclass(frozen=True)
class Lengths:
    """The lengths of a mixture of tasks."""

    tasks: tuple[TaskLengths, ...]

    @classmethod
    def open(cls, config: Config, model: str | None = None, spec: str | None = None) -> "Lengths":
        """Measures the config's trained tasks.

        Sizes of images are those of every record, by `Processor.measure` alone; only a few
        examples a task are made, for the words of their questions and responses.

        Args:
          config: tasks, limits on an image's area, and the model.
          model: a folder whose processor is taken in place of the config's model.
          spec: where images come from; None takes built-in scenes, 1024x768 for the tasks that
            need depth and 640x480 for the others.

        Raises:
          UserError: the source has nothing for a task, or gives no example of it.
        """
        folder = open_model(model or config.model.path)
        data = config.data
        processor = Processor(folder.files, folder.config, data.min_pixels, data.max_pixels)
        found = []
        for task in TASKS:
            if config.tasks[task.name].weight > 0:
                place = spec or (_DEPTH if task.needs_depth else _PLAIN)
                found.append(_measure(task, config.tasks[task.name], place, processor))
        return cls(tuple(found))

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """[count, 2] tokens and windows of prompts, and [count] tokens of their responses."""
        weights = np.array([task.weight for task in self.tasks])
        extents, responses = np.zeros((count, 2), np.int64), np.zeros(count, np.int64)
        drawn = rng.choice(len(self.tasks), count, p=weights / weights.sum())
        for number, task in enumerate(self.tasks):
            mine = np.flatnonzero(drawn == number)
            made = rng.integers(len(task.words), size=len(mine))
            extents[mine] = task.pictures[rng.integers(len(task.pictures), size=len(mine))]
            extents[mine, 0] += task.words[made]
            responses[mine] = task.responses[made]
        return extents, responses


def _measure(task: Task, settings, spec: str, processor: Processor) -> TaskLengths:
    source = open_source(spec)
    found = [
        supply
        for supply in task_sources(source, range(len(source)), task, settings)
        if isinstance(supply.maker, ImageExampleMaker)
    ]
    if not found:
        raise UserError(f"{spec} has no images for {task.name}: give another --source.")

    @cache
    def pictures(sizes: tuple[tuple[int, int], ...]) -> PromptSize:
        return processor.measure(sizes)

    extents = [
        pictures(tuple(map(tuple, supply.maker.sizes(index))))
        for supply in found
        for index in supply.indices
    ]
    words, responses = _made(found, spec, processor)
    return TaskLengths(
        settings.weight, np.array([(e.tokens, e.windows) for e in extents]), words, responses
    )


def _made(
    found: list[TaskSource], spec: str, processor: Processor
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the words of a few examples' prompts, and of their cold-start responses."""
    rng, words, responses = np.random.default_rng(0), [], []
    for number in range(_TRIES):
        supply = found[number % len(found)]
        try:
            example = supply.maker(supply.indices[number % len(supply.indices)], rng)
        except Reject:
            continue
        sizes = [image.shape[:2] for image in example.images]
        whole = processor.measure(sizes, f"{example.question} {FORMAT_PROMPT}").tokens
        words.append(whole - processor.measure(sizes).tokens)
        text = response_text(example.reason, example.answer)
        responses.append(len(processor.encode_response(text)))
        if len(words) == _MADE:
            break
    if not words:
        raise UserError(
            f"{spec} gave no {found[0].maker.task} example in {_TRIES} tries: use other images."
        )
    return np.array(words), np.array(responses)
