"""The paper's rows (arXiv 2510.27606 v2), to compare a score with.

"✗" is a model that answers directly. The general benchmarks have four models; on the first four of
them they were asked directly, on the last three with the format prompt for Spatial-SSRL only.
BUILD.md has what is known of each row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spatial_ssrl_jax.eval.scoring.scores import Scores

SPATIAL = (
    "spatial457",
    "3dsrbench",
    "spatialeval",
    "qspatial_plus",
    "whatsup",
    "viewspatial",
    "vsi_bench",
)
GENERAL = (
    "mmbench",
    "blink",
    "hallusionbench",
    "realworldqa",
    "ocrbench",
    "chartqa",
    "seedbench2_plus",
)


@dataclass(frozen=True)
class PublishedRow:
    """A published row.

    Attributes:
      model: as the paper calls it.
      scores: by benchmark, 0 to 100.
    """

    model: str
    scores: dict[str, float]


def _row(model: str, names: tuple[str, ...], *scores: float) -> PublishedRow:
    return PublishedRow(model, dict(zip(names, scores, strict=True)))


ROWS = (
    _row("Qwen2.5-VL-3B ✗", SPATIAL, 33.70, 50.30, 54.65, 33.66, 85.85, 35.38, 27.84),
    _row("Qwen2.5-VL-3B", SPATIAL, 34.82, 49.47, 50.55, 30.66, 83.54, 34.23, 30.67),
    _row("Spatial-SSRL-3B", SPATIAL, 46.07, 51.72, 59.59, 39.60, 86.71, 36.62, 33.49),
    _row("Qwen2.5-VL-7B ✗", SPATIAL, 44.67, 53.39, 62.37, 46.53, 86.95, 36.83, 38.08),
    _row("Qwen2.5-VL-7B", SPATIAL, 44.88, 54.55, 61.12, 46.53, 70.61, 36.66, 32.69),
    _row("Spatial-SSRL-7B", SPATIAL, 53.34, 56.53, 64.03, 54.46, 90.61, 37.81, 39.29),
    _row("Qwen2.5-VL-3B", GENERAL, 77.25, 48.97, 46.03, 65.23, 82.6, 84.08, 68.69),
    _row("Spatial-SSRL-3B", GENERAL, 78.29, 50.92, 49.66, 66.67, 84.1, 83.08, 68.56),
    _row("Qwen2.5-VL-7B", GENERAL, 82.23, 55.87, 52.26, 68.63, 88.5, 86.44, 70.93),
    _row("Spatial-SSRL-7B", GENERAL, 82.60, 56.23, 53.18, 69.28, 89.6, 88.08, 71.85),
)
# Which value of `Scores.extra` is the paper's, where it is not the score itself.
VARIANT = {"vsi_bench": "paper", "chartqa": "paper"}

# The paper has a mean of the spatial benchmarks only.
_MEAN = {SPATIAL: ("mean",), GENERAL: ()}


def published(benchmark: str) -> dict[str, float]:
    """The paper's scores of one benchmark, by model."""
    return {row.model: row.scores[benchmark] for row in ROWS if benchmark in row.scores}


def comparable(scores: Scores) -> float:
    """The value to compare with the paper's."""
    variant = VARIANT.get(scores.benchmark)
    return scores.extra[variant] if variant else scores.score


def blocks(ours: Mapping[str, float], titles: Mapping[str, str]) -> list[list[tuple[str, ...]]]:
    """The paper's tables with one more row, those of the two for which there is a score.

    Args:
      ours: scores by benchmark, see `comparable`.
      titles: of the columns by benchmark.

    Returns:
      The lines of each table, its head first, as cells of text.
    """
    return [
        [
            ("", *(titles[name] for name in names), *_MEAN[names]),
            *(_cells(row, names) for row in rows),
        ]
        for names, rows in _tables(ours)
    ]


def published_table(ours: Mapping[str, float], titles: Mapping[str, str]) -> str:
    """`blocks` as text, aligned."""
    texts = []
    for lines in blocks(ours, titles):
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts.append("\n".join(_aligned(line, widths) for line in lines))
    return "\n\n".join(texts)


def table_json(ours: Mapping[str, float]) -> list[dict[str, Any]]:
    """The same tables as JSON types: the rows' scores by benchmark, and their mean where the
    paper has one; null where a score is missing."""
    return [
        {"rows": [{"model": row.model, "figures": _by_column(row, names)} for row in rows]}
        for names, rows in _tables(ours)
    ]


def _by_column(row: PublishedRow, names: tuple[str, ...]) -> dict[str, float | None]:
    return dict(zip((*names, *_MEAN[names]), _row_scores(row, names), strict=True))


def _tables(ours: Mapping[str, float]) -> Iterator[tuple[tuple[str, ...], list[PublishedRow]]]:
    """Columns and rows, ours the last, of each of the paper's tables with a score of ours."""
    for names in (SPATIAL, GENERAL):
        last = PublishedRow("this model", {name: ours[name] for name in names if name in ours})
        if last.scores:
            yield names, [*(row for row in ROWS if set(row.scores) == set(names)), last]


def _row_scores(row: PublishedRow, names: tuple[str, ...]) -> list[float | None]:
    scores = [row.scores.get(name) for name in names]
    known = [score for score in scores if score is not None]
    if _MEAN[names]:
        scores.append(sum(known) / len(known) if len(known) == len(names) else None)
    return [None if score is None else round(score, 4) for score in scores]


def _cells(row: PublishedRow, names: tuple[str, ...]) -> tuple[str, ...]:
    scores = _row_scores(row, names)
    return row.model, *("–" if score is None else f"{score:.2f}" for score in scores)


def _aligned(line: tuple[str, ...], widths: list[int]) -> str:
    first, *others = line
    return "  ".join(
        [first.ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
    )
