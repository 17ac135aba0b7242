"""A benchmark that is asked during training: some of its questions, and its score."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.eval.benchmarks.registry import Benchmark, open_benchmark
from spatial_ssrl_jax.eval.options import EvalOptions
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Prediction, Question
from spatial_ssrl_jax.eval.runner import run_benchmark
from spatial_ssrl_jax.eval.scoring.scores import Scores
from spatial_ssrl_jax.inference.policy import Policy
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.parallel.sharding import Layout


@dataclass
class _Answers:
    """A `PredictionStore` in memory, for one measurement: a resumed run measures again."""

    predictions: list[Prediction] = field(default_factory=list)

    def answered(
        self, questions: Sequence[Question], prompts: Sequence[BenchmarkPrompt], samples: int
    ) -> np.ndarray:
        return np.zeros(len(questions), bool)

    def add(self, predictions: Sequence[Prediction]) -> None:
        self.predictions += predictions


@dataclass(frozen=True)
class BenchmarkEval:
    """Questions of a benchmark, and how they are asked.

    Attributes:
      benchmark: the questions.
      options: style and limits.
    """

    benchmark: Benchmark
    options: EvalOptions

    def measure(self, policy: Policy) -> tuple[list[Prediction], Scores]:
        """Asks every question, greedily; the same on every process.

        Returns:
          The scored answers and their metrics.
        """
        quiet = Progress(Console(quiet=True, force_terminal=False))  # the run's own has the screen
        predictions, _ = run_benchmark(policy, self.benchmark, self.options, _Answers(), quiet)
        return self.benchmark.score(predictions)


def eval_options(config: Config, layout: Layout) -> EvalOptions:
    """In the run's own limits: its curve is compared with itself, not with the paper."""
    return EvalOptions(
        style=config.eval.benchmark_style,
        batch_prompts=max(1, config.eval.batch_prompts // layout.batch_shards),
        new_tokens=config.rollout.max_new_tokens,
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
    )


def open_eval_benchmark(config: Config) -> Benchmark | None:
    """The questions that `eval` names, evenly over the file; None where it names none.

    Raises:
      UserError: the benchmark is not known, its files cannot be opened, or nobody knows what is
        right.
    """
    settings = config.eval
    if not settings.benchmark:
        return None
    opened = open_benchmark(
        settings.benchmark,
        Path(settings.benchmark_data),
        allow_outside_paths=config.data.allow_outside_paths,
    )
    questions, count = opened.questions, settings.benchmark_count
    if any(question.target is None for question in questions):
        raise UserError(
            f"the answers in {settings.benchmark_data} are not public, so a run cannot measure "
            "itself by them: choose another eval.benchmark, or its dev split."
        )
    if 0 < count < len(questions):
        questions = tuple(questions[i * len(questions) // count] for i in range(count))
    return replace(opened, questions=questions)
