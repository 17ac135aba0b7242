"""QSpatial-plus: distances, right within a factor of two."""

import re
from collections.abc import Sequence

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks import prompts
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.question_files import FIX_HINT, BadQuestionRow, QuestionRow
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Judgement, Prediction, Question
from spatial_ssrl_jax.eval.scoring import extract
from spatial_ssrl_jax.eval.scoring.scores import Metric

_FACTOR, _STRICTER = 2.0, 1.5
_TARGET = re.compile(r"([\d.]+)\s*([A-Za-z]+)")


def judge(prediction: Prediction) -> Judgement:
    """Right when neither length is twice the other."""
    found = extract.distance(prediction.response)
    extracted = None if found is None else f"{found:g} cm"
    return Judgement(extracted, float(_within(found, _length(prediction), _FACTOR)))


def _within(found: float | None, right: float, factor: float) -> bool:
    return found is not None and found > 0 and max(found / right, right / found) < factor


def _length(prediction: Prediction) -> float:
    """The target in centimetres."""
    match = _TARGET.fullmatch(str(prediction.target).strip())
    scale = extract.centimetres(match[2]) if match else None
    if match is None or not scale:
        raise UserError(
            f"{prediction.id}: its target {prediction.target!r} is no length such as '57 cm'."
        )
    return float(match[1]) * scale


def _stricter(predictions: Sequence[Prediction]) -> dict[str, float]:
    right = [
        _within(extract.distance(prediction.response), _length(prediction), _STRICTER)
        for prediction in predictions
    ]
    return {f"within_{_STRICTER}": 100 * sum(right) / len(right)}


def _parse(row: QuestionRow) -> Question:
    value, unit = row.text("answer_value"), row.text("answer_unit")
    try:
        positive = float(value) > 0
    except ValueError:
        positive = False
    if not positive or extract.centimetres(unit) is None:
        raise BadQuestionRow(f"{row.name}: its answer {value!r} {unit!r} is no length: {FIX_HINT}.")
    return Question(
        id=str(row.get("index")) or str(row.number),
        benchmark="qspatial_plus",
        category=str(row.get("question_type") or "all"),
        text=row.words("question"),
        target=f"{float(value):g} {unit}",
        images=row.images(),
    )


def ask(question: Question, style: Style) -> BenchmarkPrompt:
    """The benchmark's own two prompts; the reasoning one replaces the format prompt."""
    direct = style == "direct"
    template = prompts.QSPATIAL_DIRECT if direct else prompts.QSPATIAL_REASONING
    return BenchmarkPrompt(
        prompts.QSPATIAL + template.format(question=question.text), question.images
    )


QSPATIAL_PLUS = BenchmarkSpec(
    name="qspatial_plus",
    title="QSpatial+",
    files=(
        (
            "QSpatial_plus.tsv",
            "QSpatial_plus.parquet",
            "QSpatial_plus-00000-of-00001.parquet",
        ),
    ),
    columns=(("question", "answer_value", "answer_unit"),),
    parse=_parse,
    ask=ask,
    metric=Metric(judge, extra=_stricter),
)
