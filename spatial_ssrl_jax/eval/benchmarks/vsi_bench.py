"""VSI-Bench: questions about videos of rooms, with a letter or a number as the answer."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks import prompts
from spatial_ssrl_jax.eval.benchmarks.mcq import check_target, judge_choice, row_options
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.question_files import FIX_HINT, BadQuestionRow, QuestionRow
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec, area
from spatial_ssrl_jax.eval.questions import (
    BenchmarkPrompt,
    Judgement,
    Prediction,
    Question,
    score_of,
)
from spatial_ssrl_jax.eval.scoring import extract
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
# 1 − θ as the official script and as the paper's compute it: at a limit itself rounding decides
# (0.2 is above 1 − 0.8).
_LIMITS = 1 - np.linspace(0.5, 0.95, 10)
_PAPER_LIMITS = 1 - (0.5 + np.arange(10) * 0.05)


def judge(prediction: Prediction) -> Judgement:
    """An exact letter, or the mean relative accuracy of a number."""
    if _is_number(prediction.category, prediction.id):
        found, right = extract.number(prediction.response), _true_number(prediction)
        extracted = None if found is None else f"{found:g}"
        return Judgement(extracted, 0.0 if found is None else relative_accuracy(found, right))
    return judge_choice(prediction)


def relative_accuracy(found: float, right: float, strict: bool = False) -> float:
    """Fraction of θ in {.5, .55, …, .95} with |found − right| / right ≤ 1 − θ.

    Args:
      found, right: the number that is judged, and the right one.
      strict: with < and the limits of the paper's script.
    """
    off = abs(found - right) / right
    return float(np.mean(off < _PAPER_LIMITS if strict else off <= _LIMITS))


def _true_number(prediction: Prediction) -> float:
    try:
        right = float(str(prediction.target))
    except ValueError:
        right = 0.0
    if right <= 0:
        raise UserError(f"{prediction.id}: its target {prediction.target!r} is no number above 0.")
    return right


def _is_number(kind: str, name: str) -> bool:
    if kind not in _NUMBERS | _LETTERS:
        known = ", ".join(sorted(_NUMBERS | _LETTERS))
        raise UserError(f"{name} is of the type {kind!r}, not of VSI-Bench's: {known}.")
    return kind in _NUMBERS


def _cells(predictions: Sequence[Prediction]) -> list[Cell]:
    return [
        (prediction.id, prediction.category, score_of(prediction)) for prediction in predictions
    ]


def _paper(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The mean over questions with a strict limit, as in the paper's script."""
    total = 0.0
    for prediction in predictions:
        found = extract.number(prediction.response) if prediction.category in _NUMBERS else None
        if found is None:
            total += score_of(prediction)
        else:
            total += relative_accuracy(found, _true_number(prediction), strict=True)
    return {"paper": 100 * total / len(predictions)}


def _parse(row: QuestionRow) -> Question:
    """A row of the released JSON, the Hub's test.jsonl or VLMEvalKit's TSV."""
    kind, options = row.text("question_type"), _options(row)
    answer = row.text("ground_truth" if row.get("ground_truth") else "answer")
    try:
        fits = float(answer) > 0 if _is_number(kind, row.name) else bool(options)
    except ValueError:
        fits = False
    if not fits:
        raise BadQuestionRow(
            f"{row.name}: its answer {answer!r} does not fit its type {kind}: {FIX_HINT}."
        )
    return Question(
        id=str(row.get("index")).strip() or str(row.number),  # the Hub's own ids have gaps
        benchmark="vsi_bench",
        category=kind,
        text=row.words("question"),
        target=check_target(row, answer, options) if options else answer,
        options=options,
        video=row.video(_video_name(row)),
    )


def _options(row: QuestionRow) -> dict[str, str]:
    """Options by letter, from columns or a list; in both, they carry their letters already."""
    for column in ("options", "candidates"):
        if row.get(column):
            return extract.options_in("\n".join(row.items(column)))
    return {key: text.removeprefix(f"{key}. ") for key, text in row_options(row).items()}


def _video_name(row: QuestionRow) -> str:
    name = row.get("mp4_path") or row.get("video")
    return str(name) if name else f"{row.text('dataset')}/{row.text('scene_name')}.mp4"


def ask(question: Question, style: Style, joined: bool = False) -> BenchmarkPrompt:
    """The question with its options, each on a line of its own.

    Args:
      question, style: what is asked, and how.
      joined: as the released script does, without line breaks and with two letters each.
    """
    form = prompts.VSI_OPTION_AS_RELEASED if joined else prompts.VSI_OPTION
    options = "".join(
        form.format(letter=letter, text=text) for letter, text in question.options.items()
    )
    text = prompts.VSI + question.text + options
    if style == "direct":
        last = prompts.VSI_LETTER_DIRECT if options else prompts.VSI_NUMBER_DIRECT
        return BenchmarkPrompt(text + last, video=question.video)
    last = prompts.LETTER_LAST if options else prompts.VSI_NUMBER_LAST
    return BenchmarkPrompt(text + last + FORMAT_PROMPT, video=question.video)


VSI_BENCH = BenchmarkSpec(
    name="vsi_bench",
    title="VSI-Bench",
    files=(("vsi_bench.json", "test.jsonl", "VSI-Bench.tsv"),),
    columns=(
        ("mp4_path", "question_type", "question", "answer"),
        ("dataset", "scene_name", "question_type", "question", "options", "ground_truth"),
        ("index", "video", "question_type", "question", "candidates", "answer"),
    ),
    parse=_parse,
    ask=ask,
    metric=Metric(judge, _cells, dict.fromkeys(_DIRECTIONS, 1 / 3), _paper),
    pixels=(area(128), area(768)),  # of a frame, as in the model family's own reader
    frames=128,
    new_tokens=4096,
)
AS_RELEASED = replace(VSI_BENCH, ask=partial(ask, joined=True))
