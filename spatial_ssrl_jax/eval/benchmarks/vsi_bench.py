"""VSI-Bench: questions about videos of rooms, with a letter or a number as the answer."""

from collections.abc import Sequence

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks import prompts as protocol
from spatial_ssrl_jax.eval.benchmarks.mcq import check_target, judge_choice, row_options
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.question_files import FIX_HINT, BadQuestionRow, QuestionRow
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec, area
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Judgement, Prediction, Question
from spatial_ssrl_jax.eval.scoring import answers
from spatial_ssrl_jax.eval.scoring.scores import Cell, Metric
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

_NUMBERS = {
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
}
# The three levels are one task of the eight.
_DIRECTIONS = tuple(f"object_rel_direction_{level}" for level in ("easy", "medium", "hard"))
_LETTERS = {*_DIRECTIONS, "object_rel_distance", "obj_appearance_order", "route_planning"}
# 1 − θ for θ from 0.5 to 0.95, in twentieths, so that no rounding decides at a limit.
_TWENTIETHS, _ROUNDING = range(1, 11), 1e-9


def judge(record: Prediction) -> Judgement:
    """An exact letter, or the mean relative accuracy of a number."""
    if _is_number(record.category, record.id):
        found, right = answers.number(record.response), _true_number(record)
        extracted = None if found is None else f"{found:g}"
        return Judgement(extracted, 0.0 if found is None else relative_accuracy(found, right))
    return judge_choice(record)


def relative_accuracy(found: float, right: float, strict: bool = False) -> float:
    """Share of the θ in {.5, .55, …, .95} with |found − right| / right ≤ 1 − θ, or < if strict."""
    off, margin = 20 * abs(found - right) / right, -_ROUNDING if strict else _ROUNDING
    return sum(off < limit + margin for limit in _TWENTIETHS) / len(_TWENTIETHS)


def _true_number(record: Prediction) -> float:
    try:
        right = float(str(record.target))
    except ValueError:
        right = 0.0
    if right <= 0:
        raise UserError(f"{record.id}: its target {record.target!r} is no number above 0.")
    return right


def _is_number(kind: str, name: str) -> bool:
    if kind not in _NUMBERS | _LETTERS:
        known = ", ".join(sorted(_NUMBERS | _LETTERS))
        raise UserError(f"{name} is of the type {kind!r}, not of VSI-Bench's: {known}.")
    return kind in _NUMBERS


def _cells(records: Sequence[Prediction]) -> list[Cell]:
    return [(record.id, record.category, record.score) for record in records]


def _paper(records: Sequence[Prediction]) -> dict[str, float]:
    """The mean over questions with a strict limit, which the paper's script takes."""
    total = 0.0
    for record in records:
        found = answers.number(record.response) if record.category in _NUMBERS else None
        if found is None:
            total += record.score
        else:
            total += relative_accuracy(found, _true_number(record), strict=True)
    return {"paper": 100 * total / len(records)}


def _parse(row: QuestionRow) -> Question:
    kind, answer, options = row.text("question_type"), row.text("answer"), row_options(row)
    try:
        fits = float(answer) > 0 if _is_number(kind, row.name) else bool(options)
    except ValueError:
        fits = False
    if not fits:
        raise BadQuestionRow(
            f"{row.name}: its answer {answer!r} does not fit its type {kind}: {FIX_HINT}."
        )
    return Question(
        id=str(row.number),
        benchmark="vsi_bench",
        category=kind,
        text=row.words("question"),
        target=check_target(row, answer, options) if options else answer,
        # They carry their letters already.
        options={key: text.removeprefix(f"{key}. ") for key, text in options.items()},
        video=row.find("mp4_path")[0],
    )


def ask(question: Question, style: Style) -> BenchmarkPrompt:
    """Options stand on lines of their own; the released script runs them on, with two letters."""
    options = "".join(
        "\n" + protocol.OPTION.format(letter=letter, text=text).rstrip("\n")
        for letter, text in question.options.items()
    )
    text = protocol.VSI + question.text + options
    if style == "direct":
        last = protocol.VSI_LETTER_DIRECT if options else protocol.VSI_NUMBER_DIRECT
        return BenchmarkPrompt(text + last, video=question.video)
    last = protocol.LETTER_LAST if options else protocol.VSI_NUMBER_LAST
    return BenchmarkPrompt(text + last + FORMAT_PROMPT, video=question.video)


VSI_BENCH = BenchmarkSpec(
    name="vsi_bench",
    title="VSI-Bench",
    files=(("vsi_bench.json",),),
    columns=(("mp4_path", "question_type", "question", "answer"),),
    parse=_parse,
    ask=ask,
    metric=Metric(judge, _cells, dict.fromkeys(_DIRECTIONS, 1 / 3), _paper),
    pixels=(area(128), area(768)),  # of a frame, as the model family's own reader limits them
    frames=128,
    new_tokens=4096,
)
