"""What the pages of answers are made of, bounded: a spread of questions, small images, bars."""

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
from spatial_ssrl_jax.eval.questions import SAMPLE, Prediction, Question

SHOWN = 800  # questions of a page
_LETTERS = 1500  # of a text; what is longer is cut in its middle
_BYTES = 3_000_000  # of all images of a page
_SIDE, _QUALITY = 240, 70  # pixels of an image's longer side, and what JPEG keeps
_PICTURES = 4  # of a question

Questions = Mapping[tuple[str, str], Question]  # by benchmark and id


def questions_in(
    data: Path | None, answers: Sequence[Sequence[Prediction]], allow_missing: bool
) -> Questions:
    """The questions of each benchmark's answers, for their images; none without `data`.

    Raises:
      UserError: `data` cannot be opened, or holds none of the questions that were answered.
    """
    found: dict[tuple[str, str], Question] = {}
    for records in answers if data else ():
        name = records[0].benchmark
        if name == PRETEXT.name:
            raise UserError("the images of the pretext tasks are in no file: leave out --data.")
        opened = open_benchmark(name, data, allow_missing)
        known = {(name, question.id): question for question in opened.questions}
        if not any((name, record.id) in known for record in records):
            raise UserError(
                f"{data} has none of the questions that were answered (the first is "
                f"{records[0].id}): give the --data that was asked."
            )
        found |= known
    return found


def title_of(record: Prediction, *words: str) -> str:
    """A question's name, category and right answer, with `words` in between."""
    sample = [f"sample {record.meta[SAMPLE]}"] if SAMPLE in record.meta else []
    target = f"right answer {words_of(record.target)}"
    return shortened(" · ".join([record.id, *sample, record.category, *words, target]), 300)


def spread(kinds: Sequence[Hashable], most: int) -> list[int]:
    """Places of at most so many things: the first of each kind, then the second of each, …"""
    seen: Counter[Hashable] = Counter()
    rounds = []
    for kind in kinds:
        rounds.append(seen[kind])
        seen[kind] += 1
    return sorted(range(len(kinds)), key=rounds.__getitem__)[:most]


def shortened(text: str, most: int = _LETTERS) -> str:
    """A text whose middle is left out where it is too long, which it then says."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"


def words_of(target: str | Sequence[str] | None) -> str:
    """A right answer; of several any will do."""
    if isinstance(target, str):
        return target
    return " or ".join(target) if target else "–"


@dataclass
class Pictures:
    """The small images of a page, as far as its budget goes.

    Attributes:
      questions: where their images are; without any a page has none.
      left: bytes that more images may take.
      without: questions whose images did not fit in.
      broken: why some could not be read.
    """

    questions: Questions
    left: int = _BYTES
    without: int = 0
    broken: list[str] = field(default_factory=list)

    def of(self, record: Prediction) -> str:
        """HTML of a question's images, "" where there is none."""
        question = self.questions.get((record.benchmark, record.id))
        if question is None:
            return ""
        if self.left <= 0:
            self.without += 1
            return ""
        found, more = self._read(question)
        figures = "".join(
            f'<figure><img src="{image_uri(image, _SIDE, _QUALITY)}" alt=""></figure>'
            for image in found
        )
        self.left -= len(figures)
        figures += f'<p class="soft">and {more} more</p>' if figures and more > 0 else ""
        return f'<div class="images">{figures}</div>' if figures else ""

    def _read(self, question: Question) -> tuple[list[np.ndarray], int]:
        """Some of a question's images, or of its video's frames; and how many more it has."""
        some, found = question.pictures[:_PICTURES], []
        try:
            if question.video is not None:
                return stills(question.video, _PICTURES), 0
            for picture in some:
                found.append(picture.open())
        except BadImage as reason:
            self.broken.append(str(reason))
        return found, len(question.pictures) - len(some)

    def note(self) -> str:
        """What a page has to say of its images, in sentences."""
        notes = []
        if self.without:
            notes.append(
                f"Images of {self.without:,} of the questions here are left out, to keep the "
                "page small."
            )
        if self.broken:
            notes.append(f"{len(self.broken)} could not be read, the first: {self.broken[0]}")
        return " ".join(notes)


@dataclass(frozen=True)
class Bar:
    """One figure drawn as a bar.

    Attributes:
      name: plain text.
      value: 0 to 100.
      words: what is beside it.
      interval: drawn over it.
      ours: whether it stands out.
    """

    name: str
    value: float
    words: str
    interval: tuple[float, float] | None = None
    ours: bool = False


def bars(rows: Iterable[Bar]) -> str:
    """A table with one bar a line."""
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


def tiles(figures: Mapping[str, str]) -> str:
    """Scores by name, as the tiles at the top of a page."""
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(words)}</dd></div>"
        for name, words in figures.items()
    )
    return f'<dl class="tiles">{cells}</dl>'


def answer(kind: str, verdict: str, record: Prediction) -> str:
    """HTML of one response: how it was judged, what was found in it, and what it says."""
    found = "nothing can be read" if record.extracted is None else f"answer {record.extracted}"
    return (
        f'<div class="response {kind}"><div><b>{html.escape(verdict)}</b>'
        f"<small>{html.escape(shortened(found))}</small></div>"
        f"<pre>{html.escape(shortened(record.response))}</pre></div>"
    )
