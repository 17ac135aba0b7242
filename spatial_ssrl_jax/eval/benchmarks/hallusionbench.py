"""HallusionBench: yes or no; accuracy by answer, by figure and by question."""

from collections.abc import Sequence

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks import prompts
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.question_files import FIX_HINT, BadQuestionRow, QuestionRow
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec
from spatial_ssrl_jax.eval.questions import (
    BenchmarkPrompt,
    Judgement,
    Prediction,
    Question,
    score_of,
)
from spatial_ssrl_jax.eval.scoring import extract
from spatial_ssrl_jax.eval.scoring.scores import Cell, Metric, all_right, mean

_ANSWERS = {"0": "No", "1": "Yes", "no": "No", "yes": "Yes"}
_TEXT_ONLY = "0"  # visual_input of the rows that have no image
_GROUPS = ("set_id", "figure_id", "question_id")
_FIELDS = ("category", "subcategory", "visual_input", *_GROUPS)


def judge(prediction: Prediction) -> Judgement:
    found = extract.yes_or_no(prediction.response)
    right = _ANSWERS.get(str(prediction.target).strip().casefold())
    if right is None:
        raise UserError(f"{prediction.id}: its target {prediction.target!r} is neither Yes nor No.")
    return Judgement(found, float(found == right))


def _cells(predictions: Sequence[Prediction]) -> list[Cell]:
    """Answers, figures and questions; sets, which hold whole figures and questions, are drawn."""
    cells: list[Cell] = [
        (_set(prediction), "aAcc", score_of(prediction)) for prediction in predictions
    ]
    for part, column in (("fAcc", "figure_id"), ("qAcc", "question_id")):
        right = all_right(
            predictions, lambda prediction, c=column: (_set(prediction), prediction.meta[c])
        )
        cells += [(unit, part, value) for (unit, _), value in right.items()]
    return cells


def _set(prediction: Prediction) -> tuple[str, str, str]:
    """Sets are numbered anew in each category and subcategory."""
    missing = [column for column in _GROUPS if column not in prediction.meta]
    if missing:
        raise UserError(
            f"{prediction.id}: its meta has no {', '.join(missing)}, needed for its groups."
        )
    return prediction.category, prediction.meta.get("subcategory", ""), prediction.meta["set_id"]


def _extra(predictions: Sequence[Prediction]) -> dict[str, float]:
    cells = _cells(predictions)
    parts = ("aAcc", "fAcc", "qAcc")
    return {part: mean(cell for cell in cells if cell[1] == part) for part in parts}


def _parse(row: QuestionRow) -> Question | None:
    """A row of the original JSON, or of a TSV; None where it has no image."""
    name, (category, subcategory, visual, *groups) = _identity(row)
    if visual == _TEXT_ONLY:
        return None
    answer = str(row.get("gt_answer")).strip() or row.text("answer")
    if answer.casefold() not in _ANSWERS:
        raise BadQuestionRow(
            f"{row.name}: its answer {answer!r} is neither yes nor no: {FIX_HINT}."
        )
    return Question(
        id=name,
        benchmark="hallusionbench",
        category=category,
        text=row.words("question"),
        target=_ANSWERS[answer.casefold()],
        images=row.images("filename" if row.get("filename") else "image_path"),
        meta={"subcategory": subcategory, **dict(zip(_GROUPS, groups, strict=True))},
    )


def _identity(row: QuestionRow) -> tuple[str, list[str]]:
    """The id and the fields that it is made of; an index such as "VD_math_1_0_1_0" has them all."""
    name = str(row.get("index")).strip()
    fields = name.split("_")
    if len(fields) == len(_FIELDS):
        return name, fields
    if not str(row.get("visual_input")).strip():
        raise UserError(
            f"{row.name}: its index {name!r} is not of HallusionBench's six fields, and it has no "
            "visual_input."
        )
    fields = [row.text(column) for column in _FIELDS]
    return "_".join(fields), fields


def ask(question: Question, style: Style) -> BenchmarkPrompt:
    return BenchmarkPrompt(prompts.in_style(question.text, style), question.images)


HALLUSIONBENCH = BenchmarkSpec(
    name="hallusionbench",
    title="HallusionBench",
    files=(("HallusionBench.tsv", "HallusionBench.json"),),
    columns=(
        (*_FIELDS, "question"),
        ("index", "question", "answer", "l2-category"),
    ),
    parse=_parse,
    ask=ask,
    metric=Metric(judge, _cells, extra=_extra),
)
