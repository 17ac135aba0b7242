"""Which checkpoint of a run is its best: by a benchmark's score, or by held-out accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass

from spatial_ssrl_jax.config.schema import Config

HELDOUT = "heldout/mean/accuracy_greedy"
BENCHMARK_SCORE = "benchmark/{}/score"


@dataclass(frozen=True)
class BestCheckpoint:
    """The best step so far.

    Attributes:
      step: of the run; its checkpoint stays.
      metric: what it was chosen by, a name of `metrics.jsonl`.
      value: of that metric.
    """

    step: int
    metric: str
    value: float


def best_metric(config: Config) -> str | None:
    """The metric that `checkpoint.best` stands for; None when no best is kept."""
    by = config.checkpoint.best
    if by == "none":
        return None
    if by == "benchmark" or (by == "auto" and config.eval.benchmark):
        return BENCHMARK_SCORE.format(config.eval.benchmark)
    return HELDOUT


def improved(
    best: BestCheckpoint | None, step: int, metrics: Mapping[str, float], metric: str | None
) -> BestCheckpoint | None:
    """This step as the best, None where it is not better than the best so far or not measured."""
    value = metrics.get(metric) if metric else None
    if value is None or (best is not None and best.metric == metric and value <= best.value):
        return None
    return BestCheckpoint(step, metric, value)
