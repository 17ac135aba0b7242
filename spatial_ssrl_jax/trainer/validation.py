"""Validation during training: held-out images, a benchmark, and the choice of the best step."""

import time

from spatial_ssrl_jax.eval.heldout import HeldoutTable
from spatial_ssrl_jax.inference.policy import Policy
from spatial_ssrl_jax.parallel.collectives import is_primary
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.trainer.benchmark_eval import BenchmarkEval
from spatial_ssrl_jax.trainer.best_checkpoint import best_metric, improved
from spatial_ssrl_jax.trainer.context import Run
from spatial_ssrl_jax.trainer.run_log import log_benchmark


def validate(
    run: Run, stage: str, number: int, params: Params, steps_done: int | None = None
) -> tuple[dict[str, float], bool]:
    """Runs the measurements that are due, and checks whether this step is the best so far.

    Args:
      run: the run; its tables, seconds and best step are updated.
      stage: the table's key for the metrics.
      number: the run's step.
      params: the model.
      steps_done: steps done in the stage; None at the end of a stage and before the first step,
        where everything is measured.

    Returns:
      The metrics, and whether the step is the best so far.
    """
    metrics: dict[str, float] = {}
    heldout = _due(steps_done, run.config.eval.every) and bool(run.evaluation.items)
    benchmark = run.benchmark if _due(steps_done, run.config.eval.benchmark_every) else None
    if heldout or benchmark is not None:
        engine = run.engine
        policy = Policy(run.processor, engine, run.layout, params, engine.fill(params))
        if heldout:
            metrics |= _heldout_metrics(_heldout(run, stage, number, policy))
        if benchmark is not None:
            metrics |= _benchmark(run, benchmark, stage, number, policy)
    found = improved(run.state.best, number, metrics, best_metric(run.config)) if number else None
    if found is not None:
        run.state.best = found
        run.progress.say(f"step {number} is the best so far: {found.metric} {found.value:.4g}")
    return metrics, found is not None


def _due(steps_done: int | None, every: int) -> bool:
    return steps_done is None or (every > 0 and steps_done % every == 0)


def _heldout(run: Run, stage: str, number: int, policy: Policy) -> HeldoutTable:
    run.progress.doing(f"measuring held-out images ({stage}, step {number})")
    start = time.perf_counter()
    grey = number == run.total  # what the text alone gives, once
    table = run.evaluation.measure(policy, run.trained, run.config.seed, grey)
    run.state.heldout[stage] = table
    _add_seconds(run, "heldout", start)
    return table


def _benchmark(
    run: Run, evaluation: BenchmarkEval, stage: str, number: int, policy: Policy
) -> dict[str, float]:
    benchmark = evaluation.benchmark
    count, title = len(benchmark.questions), benchmark.spec.title
    run.progress.doing(f"measuring {count} questions of {title} ({stage}, step {number})")
    start = time.perf_counter()
    predictions, scores = evaluation.measure(policy)
    _add_seconds(run, "benchmark", start)
    if is_primary():
        log_benchmark(run, number, predictions, scores)
    names = {"score": scores.score, "unparsed_share": scores.unparsed / len(predictions)}
    return {f"benchmark/{benchmark.name}/{name}": value for name, value in names.items()}


def _add_seconds(run: Run, name: str, start: float) -> None:
    spent = run.state.seconds.get(name, 0.0) + time.perf_counter() - start
    run.state.seconds[name] = round(spent, 2)


def _heldout_metrics(table: HeldoutTable) -> dict[str, float]:
    return {
        f"heldout/{task}/{name}": value
        for task, row in table.items()
        for name, value in row.items()
        if name != "count" and "/" not in task
    }
