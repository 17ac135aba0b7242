"""HallusionBench: yes or no; also a figure, and a question over all its scores, at a time."""

from collections.abc import Sequence

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks import prompts as protocol
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.question_files import FIX_HINT, BadQuestionRow, QuestionRow
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Judgement, Prediction, Question
from spatial_ssrl_jax.eval.scoring import answers
from spatial_ssrl_jax.eval.scoring.scores import Cell, Metric, all_right, mean

_ANSWERS = {"0": "No", "1": "Yes", "no": "No", "yes": "Yes"}
_TEXT_ONLY = "0"  # visual_input of the rows that have no image
_GROUPS = ("set_id", "figure_id", "question_id")


def judge(record: Prediction) -> Judgement:
    found = answers.yes_or_no(record.response)
    right = _ANSWERS.get(str(record.target).strip().casefold())
    if right is None:
        raise UserError(f"{record.id}: its target {record.target!r} is neither Yes nor No.")
    return Judgement(found, float(found == right))


def _cells(records: Sequence[Prediction]) -> list[Cell]:
    """Answers, scores and questions; a set, which holds whole scores and questions, is drawn."""
    cells = [(_set(record), "aAcc", record.score) for record in records]
    for part, column in (("fAcc", "figure_id"), ("qAcc", "question_id")):
        right = all_right(records, lambda record, c=column: (_set(record), record.meta[c]))
        cells += [(unit, part, value) for (unit, _), value in right.items()]
    return cells


def _set(record: Prediction) -> tuple[str, str, str]:
    """Sets are numbered anew in each category and subcategory."""
    missing = [column for column in _GROUPS if column not in record.meta]
    if missing:
        raise UserError(
            f"{record.id}: its meta has no {', '.join(missing)}, which say what belongs together."
        )
    return record.category, record.meta.get("subcategory", ""), record.meta["set_id"]


def _extra(records: Sequence[Prediction]) -> dict[str, float]:
    cells = _cells(records)
    parts = ("aAcc", "fAcc", "qAcc")
    return {part: mean(cell for cell in cells if cell[1] == part) for part in parts}


def _parse(row: QuestionRow) -> Question | None:
    """A row of the original JSON, or of the TSV, whose index is made of the same fields."""
    if row.get("filename") or row.get("visual_input"):
        if str(row.get("visual_input")) == _TEXT_ONLY:
            return None
        category, subcategory = row.text("category"), row.text("subcategory")
        groups = {column: row.text(column) for column in _GROUPS}
        visual = row.text("visual_input")
        name = "_".join((category, subcategory, visual, *groups.values()))
        answer, column = row.text("gt_answer"), "filename"
    else:
        name, answer, column = row.text("index"), row.text("answer"), "image_path"
        parts = name.split("_")
        if len(parts) != 6:
            raise UserError(
                f"{row.name}: its index {name!r} is not of HallusionBench's six fields."
            )
        category, subcategory, visual = parts[:3]
        if visual == _TEXT_ONLY:
            return None
        groups = dict(zip(_GROUPS, parts[3:], strict=True))
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
        pictures=row.pictures(column),
        meta={"subcategory": subcategory, **groups},
    )


def ask(question: Question, style: Style) -> BenchmarkPrompt:
    return BenchmarkPrompt(protocol.in_style(question.text, style), question.pictures)


HALLUSIONBENCH = BenchmarkSpec(
    name="hallusionbench",
    title="HallusionBench",
    files=(("HallusionBench.tsv", "HallusionBench.json"),),
    columns=(
        ("visual_input", "set_id", "figure_id", "question_id", "gt_answer", "filename"),
        ("index", "question", "answer", "l2-category"),
    ),
    parse=_parse,
    ask=ask,
    metric=Metric(judge, _cells, extra=_extra),
)
