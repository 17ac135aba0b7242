"""Evaluates a model on one benchmark or a set: opens questions, runs, scores, writes results."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks.mcq import DROPPED
from spatial_ssrl_jax.eval.benchmarks.registry import (
    SPECS,
    Benchmark,
    for_server,
    names_of,
    open_benchmark,
)
from spatial_ssrl_jax.eval.options import EvalOptions
from spatial_ssrl_jax.eval.prediction_log import PredictionLog
from spatial_ssrl_jax.eval.predictions import submit, write_results
from spatial_ssrl_jax.eval.questions import Prediction
from spatial_ssrl_jax.eval.runner import in_order, run_benchmark
from spatial_ssrl_jax.eval.scoring.scores import Scores
from spatial_ssrl_jax.inference.policy import Policy
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.parallel.collectives import is_primary


def open_set(
    name: str,
    data: Path,
    allow_missing: bool,
    allow_outside_paths: bool,
    as_released: bool,
    say: Callable[[str], None],
) -> list[Benchmark]:
    """Opens a benchmark, or all of a set before any is run.

    Args:
      name: of a benchmark, or `spatial`, `general` or `all`.
      data: a question file, or a folder with the files of each; see `open_benchmark`.
      allow_missing: leave out rows, and of a set benchmarks, whose files are missing.
      allow_outside_paths, as_released: see `open_benchmark`.
      say: receives what is left out.

    Raises:
      UserError: see `open_benchmark`.
    """
    names, found = names_of(name), []
    if len(names) > 1 and not data.is_dir():
        raise UserError(f"{data} is no folder: give one that holds the files of {name}.")
    for each in names:
        spec = SPECS[each]
        if len(names) > 1 and allow_missing and not any(spec.of_folder(data)):
            say(f"{spec.title} is left out: {data} has no file of it")
            continue
        found.append(open_benchmark(each, data, allow_missing, allow_outside_paths, as_released))
        report_left_out(found[-1].left_out, spec.title, say)
        if dropped := sum(DROPPED in question.meta for question in found[-1].questions):
            say(f'{spec.title}: options such as "None" are dropped in {dropped} questions')
    if not found:
        raise UserError(f"{data} has no file of any benchmark of {name}: put them there.")
    return found


def run_and_score(
    benchmark: Benchmark,
    options: EvalOptions,
    log: PredictionLog,
    open_policy: Callable[[], Policy],
    progress: Progress,
    allow_missing: bool = False,
) -> tuple[list[Prediction], Scores] | None:
    """Asks what has no answer yet, scores all answers and writes both.

    Args:
      benchmark: the questions.
      options: style, sampling and limits.
      log: the folder of the predictions.
      open_policy: opens the model; not called where everything is answered.
      progress: shows how many questions are answered.
      allow_missing: leave out questions whose image or video cannot be read.

    Returns:
      The scored predictions and their scores; None where they are for a server, and on processes
      that do not write.

    Raises:
      UserError: see `run_benchmark`.
    """
    prompts = [benchmark.prompt(question, options.style) for question in benchmark.questions]
    if log.answered(benchmark.questions, prompts, options.samples).all():
        predictions = in_order(log.predictions, benchmark.questions)
    else:
        predictions, left_out = run_benchmark(
            open_policy(), benchmark, options, log, progress, allow_missing
        )
        report_left_out(left_out, benchmark.spec.title, progress.say)
    if not is_primary():
        return None
    if for_server(predictions):
        submit(predictions, log.folder, progress.say)
        return None
    scored, scores = benchmark.score(predictions)
    write_results(log.folder, scored, scores)
    return scored, scores


def prediction_logs(
    benchmarks: Sequence[Benchmark],
    out: Path,
    about: Mapping[str, Any],
    options: EvalOptions,
    overwrite: bool,
    apart: bool,
) -> list[PredictionLog]:
    """A log for each benchmark; `apart`, in a folder of its own below `out`.

    Raises:
      UserError: one of them holds predictions of another evaluation.
    """
    return [
        PredictionLog(
            out / benchmark.name if apart else out,
            {**about, "benchmark": benchmark.name, **options.of(benchmark.spec).about()},
            overwrite,
        )
        for benchmark in benchmarks
    ]


def report_left_out(left_out: Sequence[str], title: str, say: Callable[[str], None]) -> None:
    """Says how many were left out and why the first one was."""
    if left_out:
        say(f"{title}: {len(left_out)} left out, the first: {left_out[0]}")
