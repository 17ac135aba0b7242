"""Parts of the pages of answers: a sample of questions, small images within a budget, bars."""

import html
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.html import image_uri
from spatial_ssrl_jax.data.videos import stills
from spatial_ssrl_jax.eval.benchmarks.pretext import PRETEXT
from spatial_ssrl_jax.eval.benchmarks.registry import open_benchmark
from spatial_ssrl_jax.eval.questions import SAMPLE, Prediction, Question, Target

SHOWN = 800  # questions on a page
_MAX_CHARACTERS = 1500  # of a text; a longer one loses its middle
_MAX_BYTES = 3_000_000  # of all images on a page
_SIDE, _QUALITY = 240, 70  # longer side of an image in pixels; JPEG quality
_MAX_IMAGES = 4  # of a question

Questions = Mapping[tuple[str, str], Question]  # by benchmark and id


def questions_in(
    data: Path | None,
    answered: Sequence[Sequence[Prediction]],
    allow_missing: bool,
    allow_outside_paths: bool,
) -> Questions:
    """The questions of each benchmark's predictions, for their images; none without `data`.

    The other arguments are those of `open_benchmark`.

    Raises:
      UserError: `data` cannot be opened, or has none of the questions that were answered.
    """
    found: dict[tuple[str, str], Question] = {}
    if data is None:
        return found
    for predictions in answered:
        name = predictions[0].benchmark
        if name == PRETEXT.name:
            raise UserError("the images of the pretext tasks are in no file: leave out --data.")
        opened = open_benchmark(name, data, allow_missing, allow_outside_paths)
        known = {(name, question.id): question for question in opened.questions}
        if not any((name, prediction.id) in known for prediction in predictions):
            raise UserError(
                f"{data} has none of the questions that were answered (the first is "
                f"{predictions[0].id}): give the --data of that evaluation."
            )
        found |= known
    return found


def title_of(prediction: Prediction, *words: str) -> str:
    """A question's name, category and right answer, with `words` in between."""
    sample = [f"sample {prediction.meta[SAMPLE]}"] if SAMPLE in prediction.meta else []
    target = f"right answer {target_text(prediction.target)}"
    return shortened(" · ".join([prediction.id, *sample, prediction.category, *words, target]), 300)


def spread(kinds: Sequence[Hashable], count: int) -> list[int]:
    """Indices of at most `count` items: the first of each kind, then the second of each, …"""
    seen: Counter[Hashable] = Counter()
    rounds: list[int] = []
    for kind in kinds:
        rounds.append(seen[kind])
        seen[kind] += 1
    return sorted(range(len(kinds)), key=rounds.__getitem__)[:count]


def shortened(text: str, max_characters: int = _MAX_CHARACTERS) -> str:
    """A text, its middle replaced by a note where it is too long."""
    if len(text) <= max_characters:
        return text
    half = max_characters // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"


def target_text(target: Target) -> str:
    """The right answer, or several joined by "or"."""
    if isinstance(target, str):
        return target
    return " or ".join(target) if target else "–"


@dataclass
class PageImages:
    """The small images of a page, within a budget of bytes.

    Attributes:
      questions: whose images are shown; without any a page has none.
      left: bytes of the budget that are left.
      skipped: questions whose images exceeded it.
      broken: why some could not be read.
    """

    questions: Questions
    left: int = _MAX_BYTES
    skipped: int = 0
    broken: list[str] = field(default_factory=list)

    def of(self, prediction: Prediction) -> str:
        """HTML of a question's images, "" where there is none."""
        question = self.questions.get((prediction.benchmark, prediction.id))
        if question is None:
            return ""
        if self.left <= 0:
            self.skipped += 1
            return ""
        found, more = self._read(question)
        code = "".join(
            f'<figure><img src="{image_uri(image, _SIDE, _QUALITY)}" alt=""></figure>'
            for image in found
        )
        self.left -= len(code)
        code += f'<p class="soft">and {more} more</p>' if code and more > 0 else ""
        return f'<div class="images">{code}</div>' if code else ""

    def _read(self, question: Question) -> tuple[list[np.ndarray], int]:
        """The first images of a question, or frames of its video; and how many more it has."""
        some, found = question.images[:_MAX_IMAGES], []
        try:
            if question.video is not None:
                return stills(question.video, _MAX_IMAGES), 0
            for image in some:
                found.append(image.open())
        except BadImage as reason:
            self.broken.append(str(reason))
        return found, len(question.images) - len(some)

    def note(self) -> str:
        """Sentences on images that are left out or broken."""
        notes = []
        if self.skipped:
            notes.append(
                f"Images of {self.skipped:,} of the questions here are left out, to keep the "
                "page small."
            )
        if self.broken:
            notes.append(f"{len(self.broken)} could not be read, the first: {self.broken[0]}")
        return " ".join(notes)


@dataclass(frozen=True)
class Bar:
    """A score drawn as a bar.

    Attributes:
      name: plain text.
      value: 0 to 100.
      words: text beside the bar.
      interval: drawn over it.
      ours: whether it is highlighted.
    """

    name: str
    value: float
    words: str
    interval: tuple[float, float] | None = None
    ours: bool = False


def bars(rows: Iterable[Bar]) -> str:
    """A table with one bar a row."""
    lines = []
    for row in rows:
        name = html.escape(row.name).replace("_", "_<wbr>")  # where it may break
        mark, kind = "", ' class="ours"' if row.ours else ""
        if row.interval:
            low, high = row.interval
            mark = f'<b style="left:{low:.2f}%;width:{high - low:.2f}%"></b>'
        lines.append(
            f"<tr{kind}><td>{name}</td>"
            f"<td>{html.escape(row.words)}</td>"
            f'<td><span class="scale"><i style="width:{row.value:.2f}%"></i>{mark}</span></td></tr>'
        )
    return f'<div class="wide"><table class="bars">{"".join(lines)}</table></div>'


def tiles(scores: Mapping[str, str]) -> str:
    """Scores by name, as the tiles at the top of a page."""
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(words)}</dd></div>"
        for name, words in scores.items()
    )
    return f'<dl class="tiles">{cells}</dl>'


def answer(kind: str, outcome: str, prediction: Prediction) -> str:
    """HTML of one response: its outcome, the extracted answer and the text."""
    found = (
        "nothing can be read" if prediction.extracted is None else f"answer {prediction.extracted}"
    )
    return (
        f'<div class="response {kind}"><div><b>{html.escape(outcome)}</b>'
        f"<small>{html.escape(shortened(found))}</small></div>"
        f"<pre>{html.escape(shortened(prediction.response))}</pre></div>"
    )
