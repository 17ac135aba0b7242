"""What'sUp: which of four captions is right, parts A (photos) and B pooled."""

import string
import zlib

import numpy as np

from spatial_ssrl_jax.eval.benchmarks import prompts
from spatial_ssrl_jax.eval.benchmarks.mcq import judge_choice
from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.question_files import FIX_HINT, BadQuestionRow, QuestionRow
from spatial_ssrl_jax.eval.benchmarks.spec import BenchmarkSpec, area
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Question
from spatial_ssrl_jax.eval.scoring.scores import Metric
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

_PART_B = "controlled_clevr"
_SEED, _CAPTIONS = 0, 4


def _parse(row: QuestionRow) -> Question:
    """The first caption is the right one; they are shuffled with a seed of the question's id."""
    captions = row.get("caption_options")
    if not isinstance(captions, list) or len(captions) != _CAPTIONS or not all(captions):
        raise BadQuestionRow(f"{row.name} has no {_CAPTIONS} caption_options: {FIX_HINT}.")
    part = "B" if row.file.name.lower().startswith(_PART_B) else "A"
    name = f"{part}-{row.number}"
    order = np.random.default_rng((_SEED, zlib.crc32(name.encode()))).permutation(_CAPTIONS)
    options = {string.ascii_uppercase[i]: captions[j] for i, j in enumerate(order)}
    return Question(
        id=name,
        benchmark="whatsup",
        category=part,
        text="",
        target=string.ascii_uppercase[order.tolist().index(0)],
        options=options,
        images=row.images(),
    )


def ask(question: Question, style: Style) -> BenchmarkPrompt:
    """Captions after the instruction; with reasoning the format prompt comes last, not between
    instruction and captions as in the released script."""
    captions = "\n".join(
        prompts.WHATSUP_OPTION.format(letter=letter, text=caption)
        for letter, caption in question.options.items()
    )
    if style == "direct":
        return BenchmarkPrompt(prompts.WHATSUP_DIRECT + captions, question.images)
    text = f"{prompts.WHATSUP_PROMPT}\n\n{captions}\n{FORMAT_PROMPT}"
    return BenchmarkPrompt(text, question.images)


WHATSUP = BenchmarkSpec(
    name="whatsup",
    title="What'sUp",
    files=(("controlled_images_dataset.json",), ("controlled_clevr_dataset.json",)),
    columns=(("image_path", "caption_options"),),
    parse=_parse,
    ask=ask,
    metric=Metric(judge_choice),
    pixels=(area(4), area(512)),
    new_tokens=4096,
)
