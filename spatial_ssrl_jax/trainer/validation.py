"""Measuring a model while it trains: held-out images, a benchmark, and which step is the best."""

import time

from spatial_ssrl_jax.eval.heldout import HeldoutTable
from spatial_ssrl_jax.parallel.collectives import is_primary
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.trainer.best_checkpoint import best_metric, improved
from spatial_ssrl_jax.trainer.context import Run
from spatial_ssrl_jax.trainer.run_log import log_benchmark


def validate(
    run: Run, stage: str, number: int, params: Params, place: int | None = None
) -> tuple[dict[str, float], bool]:
    """Measures what is due, and notes whether this step is the best so far.

    Args:
      run: the run; its tables, seconds and best step are brought up to date.
      stage: under which the table has the metrics.
      number: the run's step.
      params: the model.
      place: steps done in the stage; None at the end of a stage and before the first, where
        everything is measured.

    Returns:
      The metrics, and whether the step is the best so far.
    """
    metrics: dict[str, float] = {}
    if _due(place, run.config.eval.every):
        metrics |= _heldout_metrics(_heldout(run, stage, number, params))
    if run.benchmark is not None and _due(place, run.config.eval.benchmark_every):
        metrics |= _benchmark(run, stage, number, params)
    found = improved(run.best, number, metrics, best_metric(run.config)) if number else None
    if found is not None:
        run.best = found
        run.progress.say(f"step {number} is the best so far: {found.metric} {found.value:.4g}")
    return metrics, found is not None


def _due(place: int | None, every: int) -> bool:
    return place is None or (every > 0 and place % every == 0)


def _heldout(run: Run, stage: str, number: int, params: Params) -> HeldoutTable:
    if not run.evaluation.items:
        run.progress.say("no image is held out, so there are no held-out metrics")
        return {}
    run.progress.doing(f"measuring held-out images ({stage}, step {number})")
    start = time.perf_counter()
    run.heldout[stage] = run.evaluation.measure(params, run.config.trained_tasks, run.config.seed)
    _spend(run, "heldout", start)
    return run.heldout[stage]


def _benchmark(run: Run, stage: str, number: int, params: Params) -> dict[str, float]:
    benchmark = run.benchmark.benchmark
    count, title = len(benchmark.questions), benchmark.spec.title
    run.progress.doing(f"asking {count} questions of {title} ({stage}, step {number})")
    start = time.perf_counter()
    records, scores = run.benchmark.measure(params)
    _spend(run, "benchmark", start)
    if is_primary():
        log_benchmark(run, number, records, scores)
    names = {"score": scores.score, "unparsed_share": scores.unparsed / len(records)}
    return {f"benchmark/{benchmark.name}/{name}": value for name, value in names.items()}


def _spend(run: Run, name: str, start: float) -> None:
    spent = run.seconds.get(name, 0.0) + time.perf_counter() - start
    run.seconds[name] = round(spent, 2)


def _heldout_metrics(table: HeldoutTable) -> dict[str, float]:
    return {
        f"heldout/{task}/{name}": value
        for task, row in table.items()
        for name, value in row.items()
        if name != "count"
    }
