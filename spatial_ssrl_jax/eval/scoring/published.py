"""The rows that the paper publishes (arXiv 2510.27606 v2), to are beside a score.

"✗" is a model that answers directly. The general benchmarks are given for four models; the first
four of them were asked directly, the last three with the format prompt for Spatial-SSRL only.
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
    figures: dict[str, float]


def _row(model: str, names: tuple[str, ...], *figures: float) -> PublishedRow:
    return PublishedRow(model, dict(zip(names, figures, strict=True)))


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
# Which figure of `Scores.extra` is the paper's, where it is not the score itself.
VARIANT = {"vsi_bench": "paper"}

# The paper gives a mean over the spatial ones alone.
_MEAN = {SPATIAL: ("mean",), GENERAL: ()}


def published(benchmark: str) -> dict[str, float]:
    """The paper's scores of one benchmark, by model."""
    return {row.model: row.figures[benchmark] for row in ROWS if benchmark in row.figures}


def comparable(scores: Scores) -> float:
    """The figure that the paper's is to be compared with."""
    variant = VARIANT.get(scores.benchmark)
    return scores.extra[variant] if variant else scores.score


def blocks(figures: Mapping[str, float], titles: Mapping[str, str]) -> list[list[tuple[str, ...]]]:
    """The paper's tables with one more row, of each of the two that has a figure.

    Args:
      scores: ours by benchmark, see `comparable`.
      titles: of the columns by benchmark.

    Returns:
      The lines of each table, its head first, as cells of text.
    """
    return [
        [
            ("", *(titles[name] for name in names), *_MEAN[names]),
            *(_cells(row, names) for row in rows),
        ]
        for names, rows in _tables(figures)
    ]


def table(figures: Mapping[str, float], titles: Mapping[str, str]) -> str:
    """`blocks` as text, aligned."""
    texts = []
    for lines in blocks(figures, titles):
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts.append("\n".join(_aligned(line, widths) for line in lines))
    return "\n\n".join(texts)


def table_json(figures: Mapping[str, float]) -> list[dict[str, Any]]:
    """The same tables as JSON types: the rows' scores by benchmark, and their mean where the
    paper gives it; null where there is none."""
    return [
        {"rows": [{"model": row.model, "figures": _by_column(row, names)} for row in rows]}
        for names, rows in _tables(figures)
    ]


def _by_column(row: PublishedRow, names: tuple[str, ...]) -> dict[str, float | None]:
    return dict(zip((*names, *_MEAN[names]), _row_figures(row, names), strict=True))


def _tables(figures: Mapping[str, float]) -> Iterator[tuple[tuple[str, ...], list[PublishedRow]]]:
    """Of each of the paper's tables that has a figure, its columns, and its rows with ours."""
    for names in (SPATIAL, GENERAL):
        ours = PublishedRow(
            "this model", {name: figures[name] for name in names if name in figures}
        )
        if ours.figures:
            yield names, [*(row for row in ROWS if set(row.figures) == set(names)), ours]


def _row_figures(row: PublishedRow, names: tuple[str, ...]) -> list[float | None]:
    figures = [row.figures.get(name) for name in names]
    if _MEAN[names]:
        figures.append(None if None in figures else sum(figures) / len(figures))
    return [None if figure is None else round(figure, 4) for figure in figures]


def _cells(row: PublishedRow, names: tuple[str, ...]) -> tuple[str, ...]:
    figures = _row_figures(row, names)
    return row.model, *("–" if figure is None else f"{figure:.2f}" for figure in figures)


def _aligned(line: tuple[str, ...], widths: list[int]) -> str:
    first, *others = line
    return "  ".join(
        [first.ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
    )
