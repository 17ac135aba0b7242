"""A benchmark's definition: its files, parser, prompts, metric and published settings."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.question_files import QuestionRow
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Question
from spatial_ssrl_jax.eval.scoring.scores import Metric

_TOKEN_PIXELS = 28 * 28  # of a merged patch
KIT_PIXELS = (1280 * _TOKEN_PIXELS, 16384 * _TOKEN_PIXELS)


@dataclass(frozen=True)
class BenchmarkSpec:
    """One benchmark.

    Attributes:
      name: on the command line and in predictions.
      title: in tables, as the paper writes it.
      files: names under which it is published; one of each group is needed, the first before the
        others.
      columns: of its rows; one of these groups must be complete.
      parse: makes a question of a row, None of a row that is not asked; raises
        `BadQuestionRow`. None where its questions come from no file.
      ask: makes a question's prompt in a style.
      metric: how it is scored.
      pixels: min and max area of an image in the published evaluation; None takes both from the
        model folder.
      frames: max frames of a video, likewise.
      new_tokens: max tokens of a response, likewise.
      public: whether all answers are public; without them responses cannot be scored.
    """

    name: str
    title: str
    files: tuple[tuple[str, ...], ...]
    columns: tuple[tuple[str, ...], ...]
    parse: Callable[[QuestionRow], Question | None] | None
    ask: Callable[[Question, Style], BenchmarkPrompt]
    metric: Metric
    pixels: tuple[int, int] | None = KIT_PIXELS
    frames: int | None = None
    new_tokens: int = 2048
    public: bool = True

    def file_names(self) -> set[str]:
        """The names that tell its files from those of others, in lower case."""
        names = {name.lower() for group in self.files for name in group}
        return {name for name in names if not name.startswith("test.")}  # might be anyone's

    def of_folder(self, folder: Path) -> list[Path | None]:
        """Its files in a folder or one below it, None for each group that has none there."""
        return [_find(folder, group) for group in self.files]


def area(tokens: int) -> int:
    """Pixels of so many merged tokens."""
    return tokens * _TOKEN_PIXELS


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    order = {name.lower(): place for place, name in enumerate(names)}
    paths = [*folder.glob("*"), *folder.glob("*/*")]
    found = [path for path in paths if path.name.lower() in order and path.is_file()]
    return min(found, key=lambda path: (order[path.name.lower()], path), default=None)
