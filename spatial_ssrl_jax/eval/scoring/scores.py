"""From scored records to a benchmark's figure, its categories and its confidence interval.

A figure is a weighted mean of parts, and each part the mean of its cells: one cell a question for a
plain accuracy; one a figure or a group where several questions must be right together. All cells
carry the unit that they belong to, what is drawn as a whole when the interval is bootstrapped.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spatial_ssrl_jax.eval.questions import SAMPLE, Judgement, Prediction

_DRAWS, _TOGETHER, _SEED = 1000, 50, 0
_ALL = "all"
# The unit that is drawn together, the part that it counts in, and a value from 0 to 1.
Cell = tuple[Hashable, str, float]


def each(records: Sequence[Prediction]) -> Iterable[Cell]:
    """One cell a question: the plain mean."""
    return [(r.id, _ALL, r.score) for r in records]


def all_right(records: Sequence[Prediction], group: Callable[[Prediction], Hashable]) -> dict:
    """1 for each group whose records are all right, else 0."""
    found: dict[Hashable, float] = {}
    for record in records:
        key = group(record)
        found[key] = min(found.get(key, 1.0), float(record.score == 1.0))
    return found


def no_extra(records: Sequence[Prediction]) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Metric:
    """How a benchmark is scored.

    Attributes:
      judge: one response; reads the record's target, response, question and meta.
      cells: what the figure is a mean of.
      weights: of the parts, 1 where not given.
      extra: further scores by name, 0 to 100.
    """

    judge: Callable[[Prediction], Judgement]
    cells: Callable[[Sequence[Prediction]], Iterable[Cell]] = each
    weights: Mapping[str, float] = field(default_factory=dict)
    extra: Callable[[Sequence[Prediction]], dict[str, float]] = no_extra


@dataclass(frozen=True)
class Scores:
    """What `scores.json` holds; scores go from 0 to 100.

    Attributes:
      benchmark: its name.
      score: by the benchmark's own metric.
      count: questions that were scored, each perhaps on several responses.
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
        """The fixed fields, rounded to what a thousand questions can show."""
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


def summarise(benchmark: str, metric: Metric, records: Sequence[Prediction]) -> Scores:
    """The scores of records that are scored already; there must be at least one.

    Of several responses to each question, each one's figure is taken apart, and their mean given;
    a question's responses are drawn together for the interval.
    """

    def figure(part: Sequence[Prediction]) -> float:
        return mean(cells_of(metric, part), metric.weights)

    extras = [metric.extra(sample) for sample in _samples(records)]
    names = sorted({record.category for record in records})
    parts = {name: [r for r in records if r.category == name] for name in names}
    return Scores(
        benchmark=benchmark,
        score=figure(records),
        count=len({record.id for record in records}),
        unparsed=sum(not record.parsed for record in records),
        categories={
            name: {"score": figure(part), "count": len({r.id for r in part})}
            for name, part in parts.items()
        },
        ci95=interval(cells_of(metric, records), metric.weights),
        extra={name: float(np.mean([extra[name] for extra in extras])) for name in extras[0]},
    )


def cells_of(metric: Metric, records: Sequence[Prediction]) -> list[Cell]:
    """A metric's cells; of several responses to each question, those of each one in turn."""
    return [cell for sample in _samples(records) for cell in metric.cells(sample)]


def _samples(records: Sequence[Prediction]) -> list[list[Prediction]]:
    """The records of each sample, which are all where each question has one response."""
    found: dict[Hashable, list[Prediction]] = {}
    for record in records:
        found.setdefault(record.meta.get(SAMPLE), []).append(record)
    return list(found.values())


def mean(cells: Iterable[Cell], weights: Mapping[str, float] | None = None) -> float:
    """The weighted mean of the parts' means, 0 to 100."""
    total, count, weight = _tables(cells, weights or {})
    return float(_figures(total.sum(0)[None], count.sum(0)[None], weight)[0])


def interval(
    cells: Iterable[Cell], weights: Mapping[str, float] | None = None, seed: int = _SEED
) -> tuple[float, float]:
    """95 % percentile interval of `mean` over units drawn with replacement, 0 to 100."""
    total, count, weight = _tables(cells, weights or {})
    rng, units, found = np.random.default_rng(seed), len(total), []
    for _ in range(_DRAWS // _TOGETHER):
        times = rng.multinomial(units, np.full(units, 1 / units), _TOGETHER)
        found.append(_figures(times @ total, times @ count, weight))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def _tables(
    cells: Iterable[Cell], weights: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[units, parts] sums of the cells' values, [units, parts] their number, [parts] weights."""
    units: dict[Hashable, int] = {}
    parts: dict[str, int] = {}
    places = [
        (units.setdefault(unit, len(units)), parts.setdefault(part, len(parts)), value)
        for unit, part, value in cells
    ]
    total, count = np.zeros((2, len(units), len(parts)))
    for unit, part, value in places:
        total[unit, part] += value
        count[unit, part] += 1
    return total, count, np.array([weights.get(part, 1.0) for part in parts])


def _figures(total: np.ndarray, count: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[draws] weighted means of [draws, parts]; a part that a draw has nothing of is left out."""
    there = count > 0
    means = np.divide(total, count, out=np.zeros_like(total, float), where=there)
    weights = weight * there
    return 100 * (means * weights).sum(-1) / weights.sum(-1)
