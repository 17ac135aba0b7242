"""What makes a benchmark: its files, how a row becomes a question, its words and its metric."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spatial_ssrl_jax.eval.benchmarks.prompts import Style
from spatial_ssrl_jax.eval.benchmarks.question_files import QuestionRow
from spatial_ssrl_jax.eval.questions import BenchmarkPrompt, Question
from spatial_ssrl_jax.eval.scoring.scores import Metric

_PATCH = 28 * 28  # pixels of a merged token
KIT_PIXELS = (1280 * _PATCH, 16384 * _PATCH)


@dataclass(frozen=True)
class BenchmarkSpec:
    """One benchmark.

    Attributes:
      name: on the command line and in records.
      title: in tables, as the paper writes it.
      files: names under which it is published: one of each group must be there.
      columns: what its rows have; of several forms one must be whole.
      parse: a row as a question, None for a row that the benchmark does not ask; raises `BadRow`.
        None where its questions come from no file.
      ask: a question in the words of a style.
      metric: how it is scored.
      pixels: smallest and largest area of an image that the published numbers were taken with;
        None leaves both to the model folder.
      frames: most frames of a video, likewise.
      new_tokens: most tokens of a response, likewise.
      public: whether all rows have an answer; without one they can be asked but not scored.
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
        """All names under which its files are published, in lower case."""
        return {name.lower() for group in self.files for name in group}

    def of_folder(self, folder: Path) -> list[Path | None]:
        """Its files in a folder or one below it, None for each group that has none there."""
        return [_find(folder, group) for group in self.files]


def area(tokens: int) -> int:
    """Pixels of so many merged tokens."""
    return tokens * _PATCH


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    wanted = {name.lower() for name in names}
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return next((p for p in sorted(found) if p.name.lower() in wanted and p.is_file()), None)
