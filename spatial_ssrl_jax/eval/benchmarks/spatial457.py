"""Spatial457: short answers about rendered vehicles, in seven levels."""

import re
from dataclasses import replace
from functools import partial

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks import prompts
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.question_files import QuestionRow
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Judgement, Prediction, Question
from spatial_ssrl_jax.eval.scoring import extract
from spatial_ssrl_jax.eval.scoring.scores import Metric
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

# A shape is named by its first word: "road bike", "double bus".
_KINDS = {
    "car": "suv wagon minivan sedan truck addi car",
    "bus": "articulated regular double school bus",
    "motorbike": "chopper dirtbike scooter cruiser motorbike",
    "aeroplane": "jet fighter biplane airliner aeroplane",
    "bicycle": "road utility mountain tandem bicycle",
}
_KIND_OF = {shape: kind for kind, shapes in _KINDS.items() for shape in shapes.split()}
_FIELD = re.compile(r"""Answer['"]?\s*:\s*(?:'([^']*)'|"([^"]*)"|([^'",}\n]+))""")
_LAST: dict[Style, str] = {
    "direct": prompts.DIRECTLY,
    "reasoning": FORMAT_PROMPT,
    "own": prompts.SPATIAL457_JSON,
}
_MAX_WORDS = 4  # of a direct answer; none of the right ones has more than two


def judge(prediction: Prediction) -> Judgement:
    """Right when the answer is the target's word, number, yes or no, or a shape of its kind."""
    found = _extract(prediction.response)
    return Judgement(found, float(found is not None and _same(found, str(prediction.target))))


def _extract(response: str) -> str | None:
    """The box, the field `Answer` of the prompt's JSON, or a short direct answer."""
    answer = extract.final_answer(response)
    if answer is None:
        return None
    fields = _FIELD.findall(answer.text)
    if fields:
        return "".join(fields[-1]).strip() or None
    short = answer.boxed or len(answer.text.split()) <= _MAX_WORDS
    return answer.text.rstrip(".").strip() or None if short else None


def _same(found: str, target: str) -> bool:
    answer, right = _plain(found), _plain(target)
    if answer == right:
        return True
    if right == "no":
        return answer == "0"
    if right == "yes":  # a count answers whether there is any
        return answer.isdigit() and int(answer) > 0
    kind = _KIND_OF.get(answer.split(" ")[0])
    return kind is not None and kind == _KIND_OF.get(right.split(" ")[0])


def _plain(text: str) -> str:
    text = " ".join(text.casefold().split())
    return "no" if text == "none" else extract.NUMBER_WORDS.get(text, text)


def _parse(row: QuestionRow) -> Question:
    level = row.text("category")
    if level not in prompts.SPATIAL457_LEVELS:
        raise UserError(
            f"{row.name} is of level {level!r}, not of Spatial457's "
            f"{', '.join(prompts.SPATIAL457_LEVELS)}: is this another benchmark's file?"
        )
    return Question(
        id=row.text("index"),
        benchmark="spatial457",
        category=level,
        text=row.words("question"),
        target=row.text("answer"),
        images=row.images(),
    )


def ask(question: Question, style: Style, repeat: bool = False) -> BenchmarkPrompt:
    """The benchmark's instructions with the answers that it allows, then the style's sentence.

    Args:
      question, style: what is asked, and how.
      repeat: put that sentence after each of the three pieces of text, as the released code does;
        the benchmark's own JSON template comes once.
    """
    what, last = prompts.SPATIAL457_LEVELS[question.category], _LAST[style]
    each = last if repeat and style != "own" else ""
    text = f"{prompts.SPATIAL457_PROMPT.format(what=what)}{each}<image>{question.text}{each}"
    return BenchmarkPrompt(text + prompts.SPATIAL457_STEPS + last, question.images)


SPATIAL457 = BenchmarkSpec(
    name="spatial457",
    title="Spatial457",
    files=(("Spatial457.tsv",),),
    columns=(("index", "question", "answer", "category"),),
    parse=_parse,
    ask=ask,
    metric=Metric(judge),
)
AS_RELEASED = replace(SPATIAL457, ask=partial(ask, repeat=True))
