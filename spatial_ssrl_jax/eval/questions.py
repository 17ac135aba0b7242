"""One type for the questions of every benchmark, and one for the answers that are kept of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatial_ssrl_jax.eval.benchmarks.images import BenchmarkImage

Target = str | list[str] | None
SAMPLE = "sample"  # in a record's meta: which of several responses to one question, from 1


@dataclass(frozen=True)
class Question:
    """One question of a benchmark; its images are read when they are opened.

    Attributes:
      id: unique in its benchmark, the same in every run.
      benchmark: name, as on the command line.
      category: the benchmark's own category, level or type.
      text: the question as the file has it.
      target: the right answer; several where any of them will do; None where it is not public.
      options: text of each option by letter; empty where there are none.
      images: in the order in which they are asked about.
      video: an mp4 file, or None.
      hint: what is said before the question, or "".
      meta: whatever else scoring needs, as JSON holds it.
    """

    id: str
    benchmark: str
    category: str
    text: str
    target: Target
    options: dict[str, str] = field(default_factory=dict)
    pictures: tuple[BenchmarkImage, ...] = ()
    video: Path | None = None
    hint: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkPrompt:
    """A question in the words in which a model is asked.

    Attributes:
      text: for `Processor.prompt`: images stand where `<image>` is in it, in front where it
        has no such mark; so does the video.
      images: in the order of their places.
      video: an mp4 file, or None.
    """

    text: str
    pictures: tuple[BenchmarkImage, ...] = ()
    video: Path | None = None


@dataclass(frozen=True)
class Prediction:
    """One line of `predictions.jsonl`.

    Attributes:
      id, benchmark, category, target: of the question.
      question: the text that was asked.
      response: what the model said, without special tokens.
      meta: of the question, its options among them.
      extracted: the answer found in the response, None where none could be.
      parsed: whether one was found; None before scoring.
      score: 0 to 1; None before scoring.
    """

    id: str
    benchmark: str
    category: str
    question: str
    target: Target
    response: str
    meta: dict[str, Any] = field(default_factory=dict)
    extracted: str | None = None
    parsed: bool | None = None
    score: float | None = None


@dataclass(frozen=True)
class Judgement:
    """What scoring says of one response: see `Prediction`."""

    extracted: str | None
    score: float


def unscored_prediction(
    question: Question, asked: BenchmarkPrompt, response: str, sample: int | None = None
) -> Prediction:
    """The record of one answered question, not yet scored.

    Args:
      question, asked: what was asked, and in which words.
      response: the answer.
      sample: which one of several, from 1; None where it is the only one.
    """
    meta = {**question.meta, "options": question.options} if question.options else question.meta
    meta = meta if sample is None else {**meta, SAMPLE: sample}
    return Prediction(
        id=question.id,
        benchmark=question.benchmark,
        category=question.category,
        question=asked.text,
        target=question.target,
        response=response,
        meta=meta,
    )
