"""The best checkpoint of a run: by a benchmark's score, or by held-out accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass

from spatial_ssrl_jax.config.schema import Config

HELDOUT = "heldout/mean/accuracy_greedy"
BENCHMARK_SCORE = "benchmark/{}/score"


@dataclass(frozen=True)
class BestCheckpoint:
    """The best step so far.

    Attributes:
      step: the run's step; its checkpoint is kept.
      metric: the metric that chose it, by its name in `metrics.jsonl`.
      value: the metric's value.
    """

    step: int
    metric: str
    value: float


def best_metric(config: Config) -> str | None:
    """The metric that `checkpoint.best` selects; None when no best checkpoint is kept."""
    by = config.checkpoint.best
    if by == "none":
        return None
    if by == "benchmark" or (by == "auto" and config.eval.benchmark):
        return BENCHMARK_SCORE.format(config.eval.benchmark)
    return HELDOUT


def improved(
    best: BestCheckpoint | None, step: int, metrics: Mapping[str, float], metric: str | None
) -> BestCheckpoint | None:
    """This step if it is measured and better than the best so far, else None."""
    if metric is None:
        return None
    value = metrics.get(metric)
    if value is None or (best is not None and best.metric == metric and value <= best.value):
        return None
    return BestCheckpoint(step, metric, value)
