"""QSpatial-plus: distances, right within a factor of two."""

import re
from collections.abc import Sequence

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks import prompts as protocol
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.question_files import FIX_HINT, BadQuestionRow, QuestionRow
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Judgement, Prediction, Question
from spatial_ssrl_jax.eval.scoring import answers
from spatial_ssrl_jax.eval.scoring.scores import Metric

_FACTOR, _STRICTER = 2.0, 1.5
_TARGET = re.compile(r"([\d.]+)\s*([A-Za-z]+)")


def judge(record: Prediction) -> Judgement:
    """Right when neither length is twice the other."""
    found = answers.distance(record.response)
    extracted = None if found is None else f"{found:g} cm"
    return Judgement(extracted, float(_within(found, _length(record), _FACTOR)))


def _within(found: float | None, right: float, factor: float) -> bool:
    return found is not None and found > 0 and max(found / right, right / found) < factor


def _length(record: Prediction) -> float:
    """The target in centimetres."""
    match = _TARGET.fullmatch(str(record.target).strip())
    scale = match and answers.centimetres(match[2])
    if not scale:
        raise UserError(f"{record.id}: its target {record.target!r} is no length such as '57 cm'.")
    return float(match[1]) * scale


def _stricter(records: Sequence[Prediction]) -> dict[str, float]:
    right = [
        _within(answers.distance(record.response), _length(record), _STRICTER) for record in records
    ]
    return {f"within_{_STRICTER}": 100 * sum(right) / len(right)}


def _parse(row: QuestionRow) -> Question:
    value, unit = row.text("answer_value"), row.text("answer_unit")
    try:
        positive = float(value) > 0
    except ValueError:
        positive = False
    if not positive or answers.centimetres(unit) is None:
        raise BadQuestionRow(f"{row.name}: its answer {value!r} {unit!r} is no length: {FIX_HINT}.")
    return Question(
        id=str(row.get("index")) or str(row.number),
        benchmark="qspatial_plus",
        category=str(row.get("question_type") or "all"),
        text=row.words("question"),
        target=f"{float(value):g} {unit}",
        pictures=row.pictures(),
    )


def ask(question: Question, style: Style) -> BenchmarkPrompt:
    """The benchmark's own two prompts, the reasoning one in place of the format prompt."""
    direct = style == "direct"
    template = protocol.QSPATIAL_DIRECT if direct else protocol.QSPATIAL_REASONING
    return BenchmarkPrompt(
        protocol.QSPATIAL + template.format(question=question.text), question.pictures
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
