"""VLMEvalKit's multiple choice: 3DSRBench, SpatialEval, BLINK, RealWorldQA, SEEDBench2-Plus and
MMBench v1.1, which asks each question in every rotation of its options."""

import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

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
from spatial_ssrl_jax.eval.scoring.scores import Cell, Metric, all_right, each, mean

_ROTATION = 1_000_000  # MMBench numbers rotations of question i as i + n · 1,000,000
_FLIP = "-flip"  # 3DSRBench: "ABCDEFGH", mirrored "ABCDEFGH-flip", then "-1" for another order
# Cells that pandas 2, with which the released code reads these files, takes for missing values.
_MISSING = frozenset((
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
))  # fmt: skip
DROPPED = "dropped"  # in meta: letters of the options that were dropped as missing


def judge_choice(prediction: Prediction) -> Judgement:
    """Right when the chosen letter is the target's; the options come from meta or the prompt."""
    options, target = _choices(prediction)
    letter = extract.choice(prediction.response, options)
    return Judgement(letter, float(letter == target))


def _choices(prediction: Prediction) -> tuple[dict[str, str], str]:
    """The options that were asked, by letter, and the right letter, even that of a dropped one."""
    options = prediction.meta.get("options") or extract.options_in(prediction.question)
    known = {**options, **dict.fromkeys(prediction.meta.get(DROPPED, ""), "")}
    target = extract.choice(str(prediction.target), known)  # files write "A", "(A)" or "A. chair"
    if target is None:  # the lines of the prompt that look like options are none
        options = {}
        target = extract.choice(str(prediction.target), options)
    if target is None:
        raise UserError(
            f"{prediction.id}: its target {prediction.target!r} is no letter of an option."
        )
    return options, target


def _with_unboxed(
    predictions: Sequence[Prediction],
    cells: Callable[[Sequence[Prediction]], Iterable[Cell]] = each,
) -> dict[str, float]:
    """The score where a letter behind `</think>` counts outside a box too, as in VLMEvalKit.

    Nothing where no response has a `</think>`.
    """
    if not any(extract.THOUGHT_END in prediction.response for prediction in predictions):
        return {}
    return {"with_unboxed": mean(cells([_judged_unboxed(p) for p in predictions]))}


def _judged_unboxed(prediction: Prediction) -> Prediction:
    """A scored prediction, one without an answer scored by what VLMEvalKit reads."""
    if prediction.extracted is not None:
        return prediction
    options, target = _choices(prediction)
    letter = extract.kit_choice(prediction.response, options)
    return replace(prediction, score=float(letter == target))


def ask_choice(question: Question, style: Style) -> BenchmarkPrompt:
    """VLMEvalKit's prompt; the format prompt follows its last line, as in the paper's runs."""
    text = prompts.HINT.format(hint=question.hint) if question.hint else ""
    text += prompts.QUESTION.format(question=question.text)
    if question.options:
        text += prompts.OPTIONS
        text += "".join(
            prompts.OPTION.format(letter=letter, text=option)
            for letter, option in question.options.items()
        )
        text += prompts.SELECT
    return BenchmarkPrompt(prompts.in_style(text, style), question.images)


def row_options(row: QuestionRow) -> dict[str, str]:
    """Columns A, B, … of a row, those without a value left out."""
    found = {letter: str(row.get(letter)) for letter in string.ascii_uppercase}
    return {letter: text for letter, text in found.items() if text.strip()}


def check_target(row: QuestionRow, letter: str, options: dict[str, str]) -> str:
    """The letter; raises `BadQuestionRow` where it is none of the options."""
    if letter not in options and options or len(letter) != 1:
        raise BadQuestionRow(
            f"{row.name}: its answer {letter!r} is none of its options "
            f"({', '.join(options) or 'letters'}): {FIX_HINT}."
        )
    return letter


def _question(name: str, row: QuestionRow, target: str | None, **meta: str | int) -> Question:
    options = row_options(row)
    return Question(
        id=row.text("index"),
        benchmark=name,
        category=str(row.get("category") or "all"),
        text=row.words("question"),
        target=None if target is None else check_target(row, target, options),
        options=options,
        images=row.images(),
        hint=str(row.get("hint")),
        meta=meta,
    )


def _spec(name: str, title: str, *files: str) -> BenchmarkSpec:
    return BenchmarkSpec(
        name=name,
        title=title,
        files=(files,),
        columns=(("index", "question", "A", "B", "answer"),),
        parse=lambda row: _question(name, row, row.text("answer")),
        ask=ask_choice,
        metric=Metric(judge_choice, extra=_with_unboxed),
    )


def _as_released(spec: BenchmarkSpec) -> BenchmarkSpec:
    """A benchmark as the released code reads it: options and hints such as "None" are not asked.

    A dropped option cannot be chosen: where it is the right one, every answer is wrong.
    """

    def parse(row: QuestionRow) -> Question | None:
        question = spec.parse(row) if spec.parse else None
        return None if question is None else _without_missing(question)

    return replace(spec, parse=parse)


def _without_missing(question: Question) -> Question:
    kept = {key: text for key, text in question.options.items() if text not in _MISSING}
    dropped = "".join(key for key in question.options if key not in kept)
    return replace(
        question,
        options=kept,
        hint="" if question.hint in _MISSING else question.hint,
        meta={**question.meta, DROPPED: dropped} if dropped else question.meta,
    )


def _parse_3dsrbench(row: QuestionRow) -> Question:
    return _question("3dsrbench", row, row.text("answer"), qid=row.text("qid"))


def _base(qid: str) -> str:
    return qid.partition("-")[0]


def _cells_3dsrbench(predictions: Sequence[Prediction]) -> list[Cell]:
    """Plain accuracy; flips and orders of one question are drawn together."""
    units = (_base(prediction.meta.get("qid", prediction.id)) for prediction in predictions)
    return [
        (unit, "vanilla", score_of(prediction))
        for unit, prediction in zip(units, predictions, strict=True)
    ]


def _extra_3dsrbench(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Stricter scores: right with the mirrored image too, in each order of options, in both."""
    found = {"vanilla": mean(each(predictions))}
    if all("qid" in prediction.meta for prediction in predictions):
        groups = {
            "flip": lambda qid: qid.replace(_FLIP, ""),
            "circular": lambda qid: (_base(qid), _FLIP in qid),
            "flip_circular": _base,
        }
        for name, key in groups.items():
            right = all_right(predictions, lambda prediction, key=key: key(prediction.meta["qid"]))
            found[name] = 100 * sum(right.values()) / len(right)
    return found | _with_unboxed(predictions, _cells_3dsrbench)


def _parse_mmbench(row: QuestionRow) -> Question:
    """Rows of the test split have no answer; the benchmark's server scores their responses."""
    target = str(row.get("answer")).strip() or None
    index = row.text("index")
    if not index.isdecimal():
        raise UserError(f"{row.name}: its index {index!r} is no number, as MMBench's is.")
    words = {} if target else {"text": row.words("question")}  # its server needs them
    return _question("mmbench", row, target, group=int(index) % _ROTATION, **words)


def _group(prediction: Prediction) -> int:
    """The group of a question's rotations, by meta or by their index."""
    group = prediction.meta.get("group")
    if group is None and not prediction.id.isdecimal():
        raise UserError(f"{prediction.id}: its meta has no group, and its id is no MMBench index.")
    return int(prediction.id) % _ROTATION if group is None else group


def _cells_mmbench(predictions: Sequence[Prediction]) -> list[Cell]:
    return [(group, "circular", right) for group, right in all_right(predictions, _group).items()]


def _extra_mmbench(predictions: Sequence[Prediction]) -> dict[str, float]:
    return {"vanilla": mean(each(predictions))} | _with_unboxed(predictions, _cells_mmbench)


BLINK = _spec("blink", "BLINK", "BLINK.tsv")
REALWORLDQA = _spec("realworldqa", "RealWorldQA", "RealWorldQA.tsv")
SEEDBENCH2_PLUS = _spec("seedbench2_plus", "SEEDBench2-Plus", "SEEDBench2_Plus.tsv")
SPATIALEVAL = _spec("spatialeval", "SpatialEval", "SpatialEval.tsv")
SRBENCH_3D = BenchmarkSpec(
    name="3dsrbench",
    title="3DSRBench",
    files=(("3DSRBench.tsv",),),
    columns=(("index", "question", "A", "B", "answer", "qid"),),
    parse=_parse_3dsrbench,
    ask=ask_choice,
    metric=Metric(judge_choice, _cells_3dsrbench, extra=_extra_3dsrbench),
)
MMBENCH = BenchmarkSpec(
    name="mmbench",
    title="MMBench-1.1-EN",
    files=(("MMBench_DEV_EN_V11.tsv", "MMBench_TEST_EN_V11.tsv", "MMBench_V11.tsv"),),
    columns=(("index", "question", "A", "B"),),
    parse=_parse_mmbench,
    ask=ask_choice,
    metric=Metric(judge_choice, _cells_mmbench, extra=_extra_mmbench),
    public=False,
)
AS_RELEASED = tuple(
    map(_as_released, (BLINK, REALWORLDQA, SEEDBENCH2_PLUS, SPATIALEVAL, SRBENCH_3D, MMBENCH))
)
