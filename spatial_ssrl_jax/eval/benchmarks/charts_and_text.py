"""OCRBench and ChartQA: reading text in images."""

import re
from collections.abc import Sequence

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks import prompts
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.question_files import QuestionRow
from spatial_ssrl_jax.eval.benchmarks.spec import KIT_PIXELS, BenchmarkSpec, area
from spatial_ssrl_jax.eval.questions import (
    BenchmarkPrompt,
    Judgement,
    Prediction,
    Question,
    score_of,
)
from spatial_ssrl_jax.eval.scoring import extract
from spatial_ssrl_jax.eval.scoring.scores import Cell, Metric, mean
from spatial_ssrl_jax.tasks.answers import last_box
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

_FORMULA = "Handwritten Mathematical Expression Recognition"
_OCR_TYPES = {
    *(f"{kind} Text Recognition" for kind in ("Regular", "Irregular", "Artistic", "Non-Semantic")),
    "Handwriting Recognition",
    "Digit String Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    _FORMULA,
}
_TOLERANCE, _ROUNDING = 0.05, 1e-9
_HALVES = ("human", "augmented")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")


def judge_ocr(prediction: Prediction) -> Judgement:
    """Right when any of the answers occurs in the text that was read."""
    formula = prediction.category == _FORMULA
    box = last_box(prediction.response)
    raw = (prediction.response if box is None else box).strip()
    answer = extract.final_answer(prediction.response)
    # A formula has LaTeX of its own, which is not unwrapped, and may be too long for a box.
    found = raw or None if formula else answer and answer.text
    if found is None:
        return Judgement(None, 0.0)
    targets = prediction.target if isinstance(prediction.target, list) else [str(prediction.target)]
    plain = _without_space if formula else _on_one_line
    # The text itself may have marks around it, so it also counts unchanged.
    read = (plain(found), plain(raw))
    return Judgement(found, float(any(plain(t) in text for t in targets for text in read)))


def _without_space(text: str) -> str:
    return "".join(text.split())


def _on_one_line(text: str) -> str:
    return text.casefold().strip().replace("\n", " ")


def _parse_ocr(row: QuestionRow) -> Question:
    """A row of the original JSON, or of the TSV, which writes its answers as a Python list."""
    if row.get("dataset_name"):
        name, kind = f"{row.text('dataset_name')}-{row.text('id')}", row.text("type")
        answers = row.get("answers")
        target = answers if answers and isinstance(answers, list) else row.text("answers")
    else:
        name, kind, target = row.text("index"), row.text("category"), row.text("answer")
        if target.startswith("["):
            target = row.items("answer")
    if kind not in _OCR_TYPES:
        raise UserError(f"{row.name} is of the type {kind!r}, which OCRBench does not have.")
    return Question(
        id=name,
        benchmark="ocrbench",
        category=kind,
        text=row.words("question"),
        target=target if isinstance(target, str) else [str(t) for t in target if str(t).strip()],
        images=row.images(),
    )


def ask_ocr(question: Question, style: Style) -> BenchmarkPrompt:
    """Formulas are asked directly in a reasoning run too, as in the paper's."""
    tail = prompts.DIRECTLY if question.category == _FORMULA else FORMAT_PROMPT
    return BenchmarkPrompt(prompts.in_style(question.text, style, tail), question.images)


def judge_chart(prediction: Prediction) -> Judgement:
    """Right within 5 % of the true number, else when the texts are the same."""
    answer = extract.final_answer(prediction.response)
    found = answer.text.removesuffix(".") if answer else None
    return Judgement(found, float(found is not None and relaxed(found, str(prediction.target))))


def relaxed(found: str, target: str) -> bool:
    """ChartQA's relaxed match; percentages are hundredths, as in the benchmark's script."""
    value, true = _number(found), _number(target)
    if value is None or true is None:
        return found.strip().casefold() == target.strip().casefold()
    return abs(value - true) <= (_TOLERANCE + _ROUNDING) * abs(true)


def _number(text: str) -> float | None:
    text = _THOUSANDS.sub("", text.strip()).removeprefix("$")
    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def _cells_chart(predictions: Sequence[Prediction]) -> list[Cell]:
    return [(prediction.id, _half(prediction), score_of(prediction)) for prediction in predictions]


def _paper(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The score by the released code's own reading, to compare with the paper's row."""
    cells = [
        (prediction.id, _half(prediction), float(as_released(prediction)))
        for prediction in predictions
    ]
    return {"paper": mean(cells)}


def as_released(prediction: Prediction) -> bool:
    """Right by the released code (arXiv 2510.27606), as it stands.

    The last `boxed{…}` up to its first closing brace; per cent signs with a backslash, `\\text{`
    and thousands separators go, `1:4` is 0.25, and 5 % are of the number that is found.
    """
    boxes = re.findall(r"boxed\{([^}]*)\}", prediction.response)
    text = (boxes[-1] if boxes else prediction.response).replace("\\%", "")
    text = _THOUSANDS.sub("", text.replace("\\text{", "")).replace("\\", "")
    if (ratio := re.fullmatch(r"([^:]+):([^:]+)", text)) and ratio[2] != "0":
        top, bottom = (_plain_number(part) for part in ratio.groups())
        if top is not None and bottom:
            text = f"{top / bottom:.8f}"
    text, target = text.strip(), str(prediction.target)
    found, true = _plain_number(text), _plain_number(target)
    if true is None or not found:
        return text.lower() == target.lower()
    return abs(true - found) / abs(found) <= _TOLERANCE


def _plain_number(text: str) -> float | None:
    """A number as the benchmark's script reads it."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _half(prediction: Prediction) -> str:
    split = str(prediction.meta.get("split") or prediction.category)
    half = next((half for half in _HALVES if half in split.lower()), None)
    if half is None:
        raise UserError(
            f"{prediction.id}: its split {split!r} is neither human nor augmented, so it is in "
            "neither half of ChartQA."
        )
    return half


def _parse_chart(row: QuestionRow) -> Question:
    split = row.text("split")
    return Question(
        id=row.text("index"),
        benchmark="chartqa",
        category=next((half for half in _HALVES if half in split.lower()), split),
        text=row.words("question"),
        target=row.text("answer"),
        images=row.images(),
        meta={"split": split},
    )


def ask_chart(question: Question, style: Style) -> BenchmarkPrompt:
    text = prompts.in_style(question.text + prompts.CHARTQA_PROMPT, style)
    return BenchmarkPrompt(text, question.images)


OCRBENCH = BenchmarkSpec(
    name="ocrbench",
    title="OCRBench",
    files=(("OCRBench.tsv", "OCRBench.json"),),
    columns=(
        ("dataset_name", "id", "image_path", "question", "answers", "type"),
        ("index", "question", "answer", "category"),
    ),
    parse=_parse_ocr,
    ask=ask_ocr,
    metric=Metric(judge_ocr),
    pixels=(area(100), KIT_PIXELS[1]),
)
CHARTQA = BenchmarkSpec(
    name="chartqa",
    title="ChartQA",
    files=(("ChartQA_TEST.tsv",),),
    columns=(("index", "question", "answer", "split"),),
    parse=_parse_chart,
    ask=ask_chart,
    metric=Metric(judge_chart, _cells_chart, extra=_paper),
)
