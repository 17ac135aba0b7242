"""Lengths of responses for timings and plans: a log-normal model, or a file of lengths."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spatial_ssrl_jax.common.errors import UserError

USAGE = "mean=300,sigma=0.6,cap=2048,correlation=0.4, or a file with one length or group a line"


@dataclass(frozen=True)
class LogNormalLengths:
    """Tokens of responses as models write them: many of some hundred, a few up to the limit.

    Attributes:
      mean: tokens on average, before the cap.
      sigma: standard deviation of their logarithm.
      cap: the most tokens.
      correlation: of the logarithms of two samples of a group.
    """

    mean: float = 300.0
    sigma: float = 0.6
    cap: int = 2048
    correlation: float = 0.0

    def draw(self, rng: np.random.Generator, prompts: int, group: int) -> np.ndarray:
        """[prompts, group] int32 tokens."""
        shared, own = rng.normal(size=(prompts, 1)), rng.normal(size=(prompts, group))
        normal = np.sqrt(self.correlation) * shared + np.sqrt(1 - self.correlation) * own
        tokens = np.exp(np.log(self.mean) - self.sigma**2 / 2 + self.sigma * normal)
        return np.clip(np.rint(tokens), 1, self.cap).astype(np.int32)


@dataclass(frozen=True)
class MeasuredLengths:
    """Lengths from a file.

    Attributes:
      groups: the lengths on each line.
    """

    groups: tuple[tuple[int, ...], ...]

    def draw(self, rng: np.random.Generator, prompts: int, group: int) -> np.ndarray:
        """[prompts, group] int32 tokens: of a line each, or of several where it has too few."""
        rows = []
        for _ in range(prompts):
            row: list[int] = []
            while len(row) < group:
                line = self.groups[rng.integers(len(self.groups))]
                row += rng.permutation(line).tolist()
            rows.append(row[:group])
        return np.array(rows, np.int32)


ResponseLengths = LogNormalLengths | MeasuredLengths


def parse_lengths(text: str) -> ResponseLengths:
    """What `--lengths` says; see `USAGE`.

    Raises:
      UserError: it is neither a model nor a file with whole numbers above 0.
    """
    if "=" in text and not Path(text).exists():
        return _model(text)
    try:
        lines = Path(text).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--lengths={text} cannot be read; expected {USAGE}.") from error
    groups = []
    for number, line in enumerate(lines, 1):
        words = re.split(r"[\s,]+", line.strip())
        if words == [""]:
            continue
        if not all(word.isdecimal() and 0 < int(word) <= 2**30 for word in words):
            raise UserError(
                f"--lengths: line {number} of {text} is no list of whole numbers above 0."
            )
        groups.append(tuple(map(int, words)))
    if not groups:
        raise UserError(f"--lengths: {text} has no lengths; expected {USAGE}.")
    return MeasuredLengths(tuple(groups))


def _model(text: str) -> LogNormalLengths:
    found: dict[str, float] = {}
    known = {"mean": (1, 2**30), "sigma": (0, 10), "cap": (1, 2**30), "correlation": (0, 1)}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in known:
            raise UserError(f"--lengths has no {name!r}; expected {USAGE}.")
        low, high = known[name]
        try:
            found[name] = int(value) if name == "cap" else float(value)
        except ValueError:
            found[name] = np.nan
        if not low <= found[name] <= high:
            raise UserError(f"--lengths: {part} is no number from {low} to {high}.")
    return LogNormalLengths(**found)  # pyright: ignore[reportArgumentType]
