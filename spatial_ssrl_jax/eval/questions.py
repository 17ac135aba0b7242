"""Questions of every benchmark, the prompts made of them, and the predictions that answer them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatial_ssrl_jax.eval.benchmarks.images import BenchmarkImage

Target = str | list[str] | None
SAMPLE = "sample"  # in a prediction's meta: which of several responses to one question, from 1


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
      images: in the order of their `<image>` marks.
      video: an mp4 file, or None.
      hint: text before the question, or "".
      meta: what else scoring needs, JSON types.
    """

    id: str
    benchmark: str
    category: str
    text: str
    target: Target
    options: dict[str, str] = field(default_factory=dict)
    images: tuple[BenchmarkImage, ...] = ()
    video: Path | None = None
    hint: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkPrompt:
    """A question as the model gets it, in the wording of one style.

    Attributes:
      text: for `Processor.prompt`: images go where `<image>` is in it, in front where it has no
        such mark; so does the video.
      images: in the order of their marks.
      video: an mp4 file, or None.
    """

    text: str
    images: tuple[BenchmarkImage, ...] = ()
    video: Path | None = None


@dataclass(frozen=True)
class Prediction:
    """One line of `predictions.jsonl`.

    Attributes:
      id, benchmark, category, target: of the question.
      question: the prompt's text.
      response: the model's text, without special tokens.
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
    """The extracted answer and the score of one response: see `Prediction`."""

    extracted: str | None
    score: float


def unscored_prediction(
    question: Question, prompt: BenchmarkPrompt, response: str, sample: int | None = None
) -> Prediction:
    """The prediction of one answered question, not yet scored.

    Args:
      question, prompt: the question and its prompt.
      response: the answer.
      sample: which one of several, from 1; None where it is the only one.
    """
    meta = {**question.meta, "options": question.options} if question.options else question.meta
    meta = meta if sample is None else {**meta, SAMPLE: sample}
    return Prediction(
        id=question.id,
        benchmark=question.benchmark,
        category=question.category,
        question=prompt.text,
        target=question.target,
        response=response,
        meta=meta,
    )


def score_of(prediction: Prediction) -> float:
    """The score of a scored prediction, 0 to 1; raises `ValueError` before scoring."""
    if prediction.score is None:
        raise ValueError(f"{prediction.id} is not scored yet")
    return prediction.score
