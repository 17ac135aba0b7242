"""The types every pretext task shares: what it takes, what it gives, and how it declines."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
      question: the protocol's question. `<imageN>` stands where image N goes; without any such
        mark all images come first.
      answer: the exact string that earns the accuracy reward.
      reason: one short true sentence that leads to the answer, for cold-start responses.
      truth: enough to check the answer without this code (see `examples.jsonl` in BUILD.md);
        JSON types only, coordinates in pixels [x, y] of the original image.
      source: `{"spec", "record", "image"}` of the original image.
      response: a whole cold-start response that the data brings; "" where it is made from `reason`.
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


def single_image(size: Size) -> list[Size]:
    """Sizes of the images of most tasks' examples: one as large as the record's."""
    return [size]


@dataclass(frozen=True)
class Task:
    """A pretext task: its name, its settings with the paper's defaults, and its maker.

    `make(record, rng, settings)` returns an `Example` or raises `Reject`. Every draw comes from
    `rng`, so the same record, generator state and settings give the same example. `sizes` gives the
    sizes of an example's images from the record's alone, or slightly more where a frame is left
    off: what is too large for any prompt is dropped by them before it is decoded. `chance` gives
    how often a guess in the form of the right answer is right; None where that is not known.
    """

    name: str
    needs_depth: bool
    settings: type
    make: Callable[[Record, np.random.Generator, Any], Example]
    sizes: Callable[[Size], list[Size]] = single_image
    chance: Callable[[str], float] | None = None


def source_of(record: Record) -> dict[str, str]:
    """Where an example came from, as `examples.jsonl` says it."""
    return {"spec": record.spec, "record": record.name, "image": record.path}
