"""The types that all pretext tasks share: an example, a task and its settings, a rejection."""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from spatial_ssrl_jax.tasks.record import Record


class Reject(Exception):
    """An image that yields no valid example; the message is a short, countable reason."""


@dataclass(frozen=True)
class Example:
    """One question whose answer is known by construction.

    Attributes:
      task: the task's name.
      kind: the variety within the task, for example `2x2_masked` or `near`.
      images: images in prompt order, each [H, W, 3] uint8 RGB.
      question: the protocol's question. `<imageN>` marks where image N goes; without any such
        mark all images come first.
      answer: the exact string that earns the accuracy reward.
      reason: short true sentences that lead to the answer, for SFT responses.
      truth: enough to check the answer without this code (see `examples.jsonl` in BUILD.md);
        JSON types only, coordinates in pixels [x, y] of the original image.
      source: `{"spec", "record", "image"}` of the original image.
      response: a whole SFT response that the data holds; "" where it is built from `reason`.
    """

    task: str
    kind: str
    images: tuple[np.ndarray, ...]
    question: str
    answer: str
    reason: str
    truth: dict[str, Any]
    source: dict[str, str]
    response: str = ""


Size = tuple[int, int]  # height and width of an image in pixels


class TaskSettings(Protocol):
    """Settings of a task: a frozen dataclass with at least its weight."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def weight(self) -> float:
        """Weight in the training mixture; 0 leaves the task out."""
        ...


Settings = TypeVar("Settings", bound=TaskSettings)


def single_image(size: Size, settings: TaskSettings) -> list[Size]:
    """Sizes of the images of most tasks' examples: one as large as the record's."""
    return [size]


# (a response's answer, the right one) -> the part of the accuracy's reward in [0, 1].
Grade = Callable[[str, str], float]


@dataclass(frozen=True)
class Task(Generic[Settings]):
    """A pretext task.

    Attributes:
      name: key of its settings in a config.
      needs_depth: whether it needs records with depth.
      needs_distances: whether it also needs distances, and not the order of depths alone.
      settings: class of its settings, with the paper's defaults.
      make: (record, rng, settings) -> `Example`, or raises `Reject`. Every draw comes from `rng`,
        so the same record, generator state and settings give the same example.
      sizes: (size, settings) -> sizes of an example's images from the record's size alone, or
        slightly more where a frame is trimmed: what is too large for any prompt is dropped before
        it is decoded.
      chance: example -> probability that a random answer is right, of those that its question's
        text leaves; None where that is not known.
      grade: (a wrong answer, the right one) -> what it earns of the accuracy's reward, in [0, 1],
        with `reward.partial_credit`; None where a wrong answer earns nothing.
    """

    name: str
    needs_depth: bool
    settings: type[Settings]
    make: Callable[[Record, np.random.Generator, Settings], Example]
    sizes: Callable[[Size, Settings], list[Size]] = single_image
    chance: Callable[[Example], float] | None = None
    grade: Grade | None = None
    needs_distances: bool = False


# Tasks, each with its settings.
Tasks = Mapping[Task[Any], TaskSettings]


def source_of(record: Record) -> dict[str, str]:
    """Where an example comes from, as `examples.jsonl` stores it."""
    return {"spec": record.spec, "record": record.name, "image": record.path}
