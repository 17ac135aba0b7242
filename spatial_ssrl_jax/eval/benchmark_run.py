"""Asking a model one benchmark or a set of them, and scoring what it says."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks.registry import (
    SPECS,
    Benchmark,
    for_server,
    names_of,
    open_benchmark,
)
from spatial_ssrl_jax.eval.prediction_log import PredictionLog
from spatial_ssrl_jax.eval.predictions import submit, write_results
from spatial_ssrl_jax.eval.questions import Prediction
from spatial_ssrl_jax.eval.runner import EvalOptions, in_order, run_benchmark
from spatial_ssrl_jax.eval.scoring.scores import Scores
from spatial_ssrl_jax.inference.policy import Policy
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.parallel.collectives import is_primary


def open_set(
    name: str, data: Path, allow_missing: bool, say: Callable[[str], None]
) -> list[Benchmark]:
    """Opens a benchmark, or all those of a set before any is asked.

    Args:
      name: of a benchmark, or `spatial`, `general` or `all`.
      data: a question file, or a folder with the files of each; see `open_benchmark`.
      allow_missing: leave out rows, and of a set benchmarks, whose files are missing.
      say: told what is left out.

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
        found.append(open_benchmark(each, data, allow_missing))
        report_left_out(found[-1].left_out, spec.title, say)
    if not found:
        raise UserError(f"{data} has no file of any benchmark of {name}: put them there.")
    return found


def run_and_score(
    benchmark: Benchmark,
    how: EvalOptions,
    journal: PredictionLog,
    respondent: Callable[[], Policy],
    progress: Progress,
    allow_missing: bool = False,
) -> tuple[list[Prediction], Scores] | None:
    """Asks what has no answer yet, scores all answers and writes both.

    Args:
      benchmark: the questions.
      how: words, sampling and limits.
      journal: the folder of the answers.
      respondent: opens the model; not called where everything is answered.
      progress: shows how far it is.
      allow_missing: leave out questions whose image or video cannot be read.

    Returns:
      The scored answers and their scores; None where the answers are for a server, and on
      processes that do not write.

    Raises:
      UserError: see `run_benchmark`.
    """
    asked = [benchmark.prompt(question, how.style) for question in benchmark.questions]
    if journal.answered(benchmark.questions, asked, how.samples).all():
        records = in_order(journal.records, benchmark.questions)
    else:
        records, left_out = run_benchmark(
            respondent(), benchmark, how, journal, progress, allow_missing
        )
        report_left_out(left_out, benchmark.spec.title, progress.say)
    if not is_primary():
        return None
    if for_server(records):
        submit(records, journal.folder, progress.say)
        return None
    scored, scores = benchmark.score(records)
    write_results(journal.folder, scored, scores)
    return scored, scores


def prediction_logs(
    benchmarks: Sequence[Benchmark],
    out: Path,
    about: Mapping[str, Any],
    how: EvalOptions,
    overwrite: bool,
    apart: bool,
) -> list[PredictionLog]:
    """A journal for each benchmark; `apart`, in a folder of its own below `out`.

    Raises:
      UserError: one of them holds other answers.
    """
    return [
        PredictionLog(
            out / benchmark.name if apart else out,
            {**about, "benchmark": benchmark.name, **how.of(benchmark.spec).about()},
            overwrite,
        )
        for benchmark in benchmarks
    ]


def report_left_out(left_out: Sequence[str], title: str, say: Callable[[str], None]) -> None:
    """Says how many were left out and why the first one was."""
    if left_out:
        say(f"{title}: {len(left_out)} left out, the first: {left_out[0]}")
