"""From scored predictions to a benchmark's score, its categories and its confidence interval.

A score is a weighted mean of parts, and each part the mean of its cells: one cell a question for a
plain accuracy; one a group where several questions must be right together. Each cell has a unit,
which is drawn as a whole when the interval is bootstrapped.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from spatial_ssrl_jax.eval.questions import SAMPLE, Judgement, Prediction, score_of

_DRAWS, _DRAWS_AT_A_TIME, _SEED = 1000, 50, 0
_ALL = "all"
# The unit that is drawn as a whole, the part, and a value from 0 to 1.
Cell = tuple[Hashable, str, float]
Group = TypeVar("Group", bound=Hashable)


def each(predictions: Sequence[Prediction]) -> Iterable[Cell]:
    """One cell a question: the plain mean."""
    return [(p.id, _ALL, score_of(p)) for p in predictions]


def all_right(
    predictions: Sequence[Prediction], group: Callable[[Prediction], Group]
) -> dict[Group, float]:
    """1 for each group whose predictions are all right, else 0."""
    found: dict[Group, float] = {}
    for prediction in predictions:
        key = group(prediction)
        found[key] = min(found.get(key, 1.0), float(prediction.score == 1.0))
    return found


def no_extra(predictions: Sequence[Prediction]) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Metric:
    """How a benchmark is scored.

    Attributes:
      judge: one response; reads the prediction's target, response, question and meta.
      cells: the values that the score is a mean of.
      weights: of the parts, 1 where not given.
      extra: further scores by name, 0 to 100.
    """

    judge: Callable[[Prediction], Judgement]
    cells: Callable[[Sequence[Prediction]], Iterable[Cell]] = each
    weights: Mapping[str, float] = field(default_factory=dict)
    extra: Callable[[Sequence[Prediction]], dict[str, float]] = no_extra


@dataclass(frozen=True)
class Scores:
    """The content of `scores.json`; scores go from 0 to 100.

    Attributes:
      benchmark: its name.
      score: by the benchmark's own metric.
      count: questions that were scored, on one or several responses each.
      unparsed: responses in which no answer was found; each counts as wrong.
      categories: the same metric over each category, in the order of their names.
      ci95: bootstrapped 95 % interval of the score.
      extra: other scores of the benchmark, the paper's variant among them.
    """

    benchmark: str
    score: float
    count: int
    unparsed: int
    categories: dict[str, dict[str, float]]
    ci95: tuple[float, float]
    extra: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """The fixed fields, scores rounded to four digits."""
        return {
            "benchmark": self.benchmark,
            "score": round(self.score, 4),
            "count": self.count,
            "unparsed": self.unparsed,
            "categories": {
                name: {"score": round(found["score"], 4), "count": found["count"]}
                for name, found in self.categories.items()
            },
            "ci95": [round(bound, 4) for bound in self.ci95],
            "extra": {name: round(value, 4) for name, value in self.extra.items()},
        }


def summarise(benchmark: str, metric: Metric, predictions: Sequence[Prediction]) -> Scores:
    """The scores of predictions that are scored already; there must be at least one.

    Of several responses to each question, each sample has a score of its own, and their mean
    counts; a question's responses are drawn together for the interval.
    """

    def score(part: Sequence[Prediction]) -> float:
        return mean(cells_of(metric, part), metric.weights)

    extras = [metric.extra(sample) for sample in _samples(predictions)]
    shared = [name for name in extras[0] if all(name in extra for extra in extras)]
    names = sorted({prediction.category for prediction in predictions})
    parts = {name: [r for r in predictions if r.category == name] for name in names}
    return Scores(
        benchmark=benchmark,
        score=score(predictions),
        count=len({prediction.id for prediction in predictions}),
        unparsed=sum(not prediction.parsed for prediction in predictions),
        categories={
            name: {"score": score(part), "count": len({r.id for r in part})}
            for name, part in parts.items()
        },
        ci95=interval(cells_of(metric, predictions), metric.weights),
        extra={name: float(np.mean([extra[name] for extra in extras])) for name in shared},
    )


def cells_of(metric: Metric, predictions: Sequence[Prediction]) -> list[Cell]:
    """A metric's cells; of several responses to each question, sample by sample."""
    return [cell for sample in _samples(predictions) for cell in metric.cells(sample)]


def _samples(predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """The predictions of each sample; all are one sample where questions have one response."""
    found: dict[Hashable, list[Prediction]] = {}
    for prediction in predictions:
        found.setdefault(prediction.meta.get(SAMPLE), []).append(prediction)
    return list(found.values())


def mean(cells: Iterable[Cell], weights: Mapping[str, float] | None = None) -> float:
    """The weighted mean of the parts' means, 0 to 100."""
    total, count, weight = _sums(cells, weights or {})
    return float(_weighted_means(total.sum(0)[None], count.sum(0)[None], weight)[0])


def interval(
    cells: Iterable[Cell], weights: Mapping[str, float] | None = None, seed: int = _SEED
) -> tuple[float, float]:
    """95 % percentile interval of `mean` over units drawn with replacement, 0 to 100."""
    total, count, weight = _sums(cells, weights or {})
    rng, units, found = np.random.default_rng(seed), len(total), []
    for _ in range(_DRAWS // _DRAWS_AT_A_TIME):
        times = rng.multinomial(units, np.full(units, 1 / units), _DRAWS_AT_A_TIME)
        found.append(_weighted_means(times @ total, times @ count, weight))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def _sums(
    cells: Iterable[Cell], weights: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[units, parts] sums of the cells' values, [units, parts] their number, [parts] weights."""
    units: dict[Hashable, int] = {}
    parts: dict[str, int] = {}
    indexed = [
        (units.setdefault(unit, len(units)), parts.setdefault(part, len(parts)), value)
        for unit, part, value in cells
    ]
    total, count = np.zeros((2, len(units), len(parts)))
    for unit, part, value in indexed:
        total[unit, part] += value
        count[unit, part] += 1
    return total, count, np.array([weights.get(part, 1.0) for part in parts])


def _weighted_means(total: np.ndarray, count: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[draws] weighted means of [draws, parts]; parts without a cell in a draw are left out."""
    present = count > 0
    means = np.divide(total, count, out=np.zeros_like(total, float), where=present)
    weights = weight * present
    return 100 * (means * weights).sum(-1) / weights.sum(-1)
