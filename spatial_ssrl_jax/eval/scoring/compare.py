"""Compares two models on one benchmark, question by question, with a test of significance."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.text import shown
from spatial_ssrl_jax.eval.benchmarks.registry import SCORED, score_predictions
from spatial_ssrl_jax.eval.questions import SAMPLE, Prediction, score_of
from spatial_ssrl_jax.eval.scoring.scores import Cell, Metric, Scores, cells_of, interval, mean

GAINED, LOST = "gained", "lost"
BOTH_RIGHT, BOTH_PARTLY, BOTH_WRONG = "both right", "both partly right", "both wrong"
CHANGES = (GAINED, LOST, BOTH_RIGHT, BOTH_PARTLY, BOTH_WRONG)

_NOT_BINARY = "scores are not only right or wrong"
_NOT_INDEPENDENT = "answers that are drawn together are not independent"
_MAX_NAMED = 3  # ids in a sentence


@dataclass(frozen=True)
class Comparison:
    """How B's answers differ from A's; scores go from 0 to 100.

    Attributes:
      a, b: the scored predictions of both, in the same order.
      scores: of A and of B, over these questions.
      difference: B's score less A's.
      ci95: its 95 % interval, by a bootstrap that draws the same questions for both.
      p_value: of McNemar's exact test, two-sided; None where it does not apply.
      no_test: why it does not apply, else "".
      changes: of each question, one of `CHANGES`.
      categories: score of A, of B, and difference of each category.
    """

    a: list[Prediction]
    b: list[Prediction]
    scores: tuple[Scores, Scores]
    difference: float
    ci95: tuple[float, float]
    p_value: float | None
    no_test: str
    changes: list[str]
    categories: dict[str, dict[str, float]]

    def ids(self, change: str) -> list[str]:
        """Ids of the questions with a change, in the order of A's file."""
        return [p.id for p, found in zip(self.a, self.changes, strict=True) if found == change]

    def as_json(self) -> dict[str, Any]:
        """The content of `comparison.json`."""
        counts = Counter(self.changes)
        return {
            "benchmark": self.scores[0].benchmark,
            "count": len(self.a),
            "a": _short(self.scores[0]),
            "b": _short(self.scores[1]),
            "difference": round(self.difference, 4),
            "ci95": [round(bound, 4) for bound in self.ci95],
            "mcnemar_p": self.p_value,
            "no_mcnemar": self.no_test or None,
            "changes": {change: counts[change] for change in CHANGES},
            "categories": {
                name: {key: round(value, 4) for key, value in found.items()}
                for name, found in self.categories.items()
            },
            "flipped": {GAINED: self.ids(GAINED), LOST: self.ids(LOST)},
        }


def compare(a: Sequence[Prediction], b: Sequence[Prediction]) -> Comparison:
    """Scores and compares answers to the same questions, in the same order: see `in_pairs`.

    Raises:
      UserError: they cannot be scored, or differ in how questions are grouped.
    """
    (scored_a, scores_a), (scored_b, scores_b) = score_predictions(a), score_predictions(b)
    metric = SCORED[scores_a.benchmark].metric
    pairs = _paired_cells(metric, scored_a, scored_b)
    difference = [(unit, part, y - x) for unit, part, x, y in pairs]
    p_value, no_test = _test(pairs)
    return Comparison(
        a=scored_a,
        b=scored_b,
        scores=(scores_a, scores_b),
        difference=mean(difference, metric.weights),
        ci95=interval(difference, metric.weights),
        p_value=p_value,
        no_test=no_test,
        changes=[change(score_of(x), score_of(y)) for x, y in zip(scored_a, scored_b, strict=True)],
        categories=_categories(scores_a, scores_b),
    )


def in_pairs(
    a: Sequence[Prediction], b: Sequence[Prediction], allow_missing: bool = False
) -> tuple[list[Prediction], list[Prediction]]:
    """The answers to the questions that both have, in A's order.

    Args:
      a, b: predictions of one benchmark each.
      allow_missing: leave out questions that only one has.

    Raises:
      UserError: they are of different benchmarks, categories or targets, or, unless
        `allow_missing`, one has questions that the other lacks.
    """
    benchmarks = [
        sorted({prediction.benchmark for prediction in predictions}) for predictions in (a, b)
    ]
    if benchmarks[0] != benchmarks[1]:
        first, second = (", ".join(names) for names in benchmarks)
        raise UserError(
            f"A holds answers to {first} and B to {second}: give two runs of one benchmark."
        )
    of_a, of_b = (
        {_key(prediction): prediction for prediction in predictions} for predictions in (a, b)
    )
    alone = [p.id for p in a if _key(p) not in of_b], [p.id for p in b if _key(p) not in of_a]
    found = [(prediction, of_b[key]) for key, prediction in of_a.items() if key in of_b]
    if any(alone) and not (allow_missing and found):
        lacking = [
            f"{_some(only)} only in {name}" for only, name in zip(alone, "AB", strict=True) if only
        ]
        rest = "; --allow-missing compares the rest" if found else ""
        raise UserError(f"{' and '.join(lacking)}: give two runs over the same questions{rest}.")
    for x, y in found:
        if x.category != y.category:
            raise UserError(
                f"the category of {x.id} is {shown(x.category)} in A and {shown(y.category)} in "
                "B: ask again with one question file, or score both with one version."
            )
        if x.target != y.target:
            raise UserError(
                f"the right answer to {x.id} is {x.target!r} in A and {y.target!r} in B: the "
                "question files differ; ask again with one, or score both with one version."
            )
    return [x for x, _ in found], [y for _, y in found]


def change(a: float, b: float) -> str:
    """How one question changed, by both scores from 0 to 1."""
    if a != b:
        return GAINED if b > a else LOST
    return {1.0: BOTH_RIGHT, 0.0: BOTH_WRONG}.get(a, BOTH_PARTLY)


def mcnemar(lost: int, gained: int) -> float:
    """The two-sided p-value of McNemar's exact test.

    Were both models equally good, each change would go either way with probability one half.

    Args:
      lost: right in A and wrong in B.
      gained: wrong in A and right in B.
    """
    from scipy.stats import binomtest  # takes longer to import than scoring a benchmark

    changed = lost + gained
    return float(binomtest(lost, changed, 0.5).pvalue) if changed else 1.0


def _key(prediction: Prediction) -> tuple[str, int]:
    """A prediction's question and sample."""
    return prediction.id, prediction.meta.get(SAMPLE, 1)


def _some(ids: Sequence[str]) -> str:
    more = ", …" if len(ids) > _MAX_NAMED else ""
    noun = "question is" if len(ids) == 1 else "questions are"
    return f"{len(ids)} {noun} ({', '.join(ids[:_MAX_NAMED])}{more})"


def _short(scores: Scores) -> dict[str, Any]:
    whole = scores.as_json()
    return {key: whole[key] for key in ("score", "ci95", "unparsed", "extra")}


def _paired_cells(
    metric: Metric, a: Sequence[Prediction], b: Sequence[Prediction]
) -> list[tuple[Any, str, float, float]]:
    """Unit, part, and the values of A and B of each cell of the score."""
    cells: list[list[Cell]] = [cells_of(metric, predictions) for predictions in (a, b)]
    units = [[cell[:2] for cell in found] for found in cells]
    if units[0] != units[1]:
        raise UserError(
            "A and B group their questions differently: their category or meta differ; ask again, "
            "or score both with one version."
        )
    return [(*x, y[2]) for x, y in zip(*cells, strict=True)]


def _test(pairs: Iterable[tuple[Any, str, float, float]]) -> tuple[float | None, str]:
    """McNemar's p-value over the cells; or None, and why the test does not apply."""
    pairs = list(pairs)
    if len({unit for unit, *_ in pairs}) < len(pairs):
        return None, _NOT_INDEPENDENT
    values = [(x, y) for *_, x, y in pairs]
    if any(value not in (0.0, 1.0) for both in values for value in both):
        return None, _NOT_BINARY
    return mcnemar(values.count((1.0, 0.0)), values.count((0.0, 1.0))), ""


def _categories(a: Scores, b: Scores) -> dict[str, dict[str, float]]:
    found = {}
    for name, row in a.categories.items():
        scores = row["score"], b.categories[name]["score"]
        found[name] = {
            "a": scores[0],
            "b": scores[1],
            "difference": scores[1] - scores[0],
            "count": row["count"],
        }
    return found
