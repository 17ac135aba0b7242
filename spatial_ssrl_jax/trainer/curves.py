"""Metrics over steps, as SVG figures."""

import html
import json
import math
from collections.abc import Callable, Sequence

Points = list[tuple[int, float]]

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 352, 8, 166
_POINTS = 300  # of a curve; a longer one is drawn as means over neighbours
COLOURS = 6  # in the page's style, as --s0 and so on


def figure(title: str, series: dict[str, Points], starts: dict[str, int]) -> str:
    """A figure with one curve for each series, and the values under the pointer.

    Args:
      title: plain text.
      series: (step, value) of each curve, steps rising; a single curve is named "".
      starts: first step of each stage; all but the first are marked.
    """
    series, bin_size = _downsample(series)
    steps = sorted({step for points in series.values() for step, _ in points})
    values = [value for points in series.values() for _, value in points]
    ticks = nice_ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)

    def across(step: float) -> float:
        return _LEFT + (step - steps[0]) / ((steps[-1] - steps[0]) or 1) * (_RIGHT - _LEFT)

    def up(value: float) -> float:
        return _BOTTOM - (value - low) / ((high - low) or 1) * (_BOTTOM - _TOP)

    grid = "".join(
        f'<path class="grid" d="M{_LEFT} {up(t):.1f}H{_RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{up(t) + 4:.1f}" text-anchor="end">{_label(t, ticks)}</text>'
        for t in ticks
    )
    lines = []
    for i, points in enumerate(series.values()):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        stroke = f"var(--s{i % COLOURS})"
        lines.append(f'<polyline class="line" points="{path}" style="stroke:{stroke}"/>')
    note = f' <span class="soft">means of {bin_size} steps</span>' if bin_size > 1 else ""
    return (
        f'<figure data-curves="{html.escape(_cursor_values(series, steps))}">'
        f"<figcaption>{html.escape(title)}{note}<output></output></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{grid}{_stages(starts, steps, across)}{''.join(lines)}"
        f'<path class="cursor" d="M0 {_TOP}V{_BOTTOM}"/>'
        f'<text x="{_LEFT}" y="{_BOTTOM + 16}">{steps[0]}</text>'
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_BOTTOM + 16}" text-anchor="middle">step</text>'
        f'<text x="{_RIGHT}" y="{_BOTTOM + 16}" text-anchor="end">{steps[-1]}</text></svg>'
        f"{legend([name for name in series if name])}</figure>"
    )


def legend(names: Sequence[str]) -> str:
    """The colours of the series, in their order."""
    return "".join(
        f'<span class="key"><i style="background:var(--s{i % COLOURS})"></i>'
        f"{html.escape(name)}</span>"
        for i, name in enumerate(names)
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span about `low` to `high`."""
    if high <= low:
        spread = abs(low) or 1.0
        low, high = low - spread / 2, high + spread / 2
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [step * n for n in range(first, last + 1)]


def _label(tick: float, ticks: list[float]) -> str:
    step = ticks[1] - ticks[0]
    if abs(tick) >= 1e5 or (0 < max(map(abs, ticks)) < 1e-3):
        return f"{tick:.1e}".replace("e-0", "e-").replace("e+0", "e")
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{tick:.{digits + (round(step * 10**digits, 6) % 1 > 0)}f}"


def _downsample(series: dict[str, Points]) -> tuple[dict[str, Points], int]:
    """Curves of at most `_POINTS` means over neighbours, and how many steps each mean covers."""
    size = max(1, -(-max(map(len, series.values())) // _POINTS))
    if size == 1:
        return series, 1
    means = {}
    for name, points in series.items():
        bins = [points[i : i + size] for i in range(0, len(points), size)]
        means[name] = [(b[-1][0], sum(v for _, v in b) / len(b)) for b in bins]
    return means, size


def _cursor_values(series: dict[str, Points], steps: list[int]) -> str:
    """The data of the page's script, as JSON; null where a curve has no value."""
    values = {name: [dict(points).get(step) for step in steps] for name, points in series.items()}
    return json.dumps({"steps": steps, "series": values, "left": _LEFT, "right": _RIGHT})


def _stages(starts: dict[str, int], steps: list[int], across: Callable[[float], float]) -> str:
    """Marks at the first step of each later stage."""
    marks = []
    for name, step in starts.items():
        if steps[0] < step <= steps[-1]:
            x = across(step)
            side = ("end", -4) if x > (_LEFT + _RIGHT) / 2 else ("start", 4)
            marks.append(
                f'<path class="grid" stroke-dasharray="3 3" d="M{x:.1f} {_TOP}V{_BOTTOM}"/>'
                f'<text x="{x + side[1]:.1f}" y="{_TOP + 10}" text-anchor="{side[0]}">'
                f"{html.escape(name)}</text>"
            )
    return "".join(marks)
