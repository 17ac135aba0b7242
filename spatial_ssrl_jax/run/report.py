"""`report.html`: one file, readable without a server, refreshed while the run goes on."""

import base64
import html
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from spatial_ssrl_jax.run.metrics import read_metrics
from spatial_ssrl_jax.run.rollouts import FOLDER, read_rollouts

_FILES, _PICTURE = 4, 320
_CURVES = (  # title and the metrics drawn together; a trailing * takes every task
    ("Reward", ("reward/overall_mean",)),
    ("Accuracy per task", ("task/*/accuracy",)),
    ("Response length (tokens)", ("response/length_mean",)),
    ("KL to the reference", ("kl/mean",)),
    ("Entropy (nats)", ("policy/entropy",)),
    ("Groups without variance", ("advantage/zero_variance_share",)),
    ("Supervised loss", ("loss/sft",)),
)
_PHASES = ("rollout", "reward", "reference", "update", "input_wait")
_COLOURS = ("#0a84d0", "#d0552b", "#2b9348", "#8e5bd0", "#b08900")
_STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; padding: .6rem; }
figcaption { font-weight: 600; } svg { width: 100%; height: auto; } svg text { fill: currentColor; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.warning { border-left: .3rem solid #d0552b; padding-left: .8rem; }
article { border-top: 1px solid var(--line); padding: .8rem 0; }
article img { max-height: 12rem; max-width: 100%; margin-right: .3rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; margin: .2rem 0; }
.bar { display: flex; height: 1.4rem; }
.key { white-space: nowrap; margin-right: 1rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; }
td:has(pre) { width: 100%; } td { vertical-align: top; }
select { font: inherit; }
"""
_SCRIPT = """
const task = document.getElementById('task'), step = document.getElementById('step');
const show = () => { for (const a of document.querySelectorAll('article')) a.hidden =
  (task.value !== 'all' && a.dataset.task !== task.value) ||
  (step.value !== 'all' && a.dataset.step !== step.value); };
if (task) { task.onchange = show; step.onchange = show; }
"""


def write_report(workdir: Path, config: dict[str, Any], title: str) -> None:
    """Writes the report from what the run's folder holds.

    Args:
      workdir: the run's folder, with `metrics.jsonl` and `rollouts/`.
      config: the config as plain types.
      title: the run's name.
    """
    rows = read_metrics(workdir)
    rollouts = read_rollouts(workdir, _FILES)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _summary(config, rows),
        *(f'<p class="warning">{html.escape(w)}</p>' for w in warnings(rows)),
        f'<div class="curves">{"".join(_curves(rows))}</div>',
        _timing(rows),
        _heldout(rows),
        _rollouts(Path(workdir), rollouts),
        f"<details><summary>Config</summary><pre>{html.escape(json.dumps(config, indent=1))}</pre>"
        "</details>",
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>{''.join(parts)}"
        f"<script>{_SCRIPT}</script></html>\n"
    )
    path = Path(workdir) / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page)
    os.replace(partial, path)


def warnings(rows: list[dict[str, Any]]) -> list[str]:
    """What in the figures should worry a reader, in words."""
    grpo = [r for r in rows if r["stage"] == "grpo" and "reward/overall_mean" in r]
    if len(grpo) < 10:
        return []
    found, late = [], grpo[-5:]

    def mean(name: str, part: list[dict]) -> float:
        values = [r[name] for r in part if r.get(name) is not None]
        return sum(values) / len(values) if values else 0.0

    def check(broken: bool, text: str) -> None:
        if broken:
            found.append(text)

    early = grpo[:5]
    flat = mean("advantage/zero_variance_share", late)
    check(
        flat > 0.8, f"{flat:.0%} of the groups have no variance in reward: little is learned now."
    )
    entropy = mean("policy/entropy", late), mean("policy/entropy", early)
    check(entropy[0] < 0.1 * entropy[1], "The entropy fell below a tenth of what it was.")
    length = mean("response/length_mean", late), mean("response/length_mean", early)
    check(length[0] < 0.3 * length[1], "Responses are shorter than a third of what they were.")
    gap = mean("mismatch/logprob_mean", late)
    check(gap > 0.05, f"Sampler and trainer differ by {gap:.3f} nats a token.")
    cut = mean("response/clipped_share", late)
    check(cut > 0.2, f"{cut:.0%} of the responses are cut off at the limit.")
    return found


def _summary(config: dict[str, Any], rows: list[dict]) -> str:
    trained = [name for name, task in config["tasks"].items() if task["weight"] > 0]
    model = config["model"]["path"] + (" from scratch" if config["model"]["from_scratch"] else "")
    at = f"{rows[-1]['stage']}, step {rows[-1]['step']}" if rows else "not begun"
    total = config["sft"]["steps"] + config["grpo"]["steps"]
    text = f"{model} on {config['data']['source']}: {', '.join(trained)}. At {at} of {total}."
    return f"<p>{html.escape(text)}</p>"


def _curves(rows: list[dict]) -> list[str]:
    figures = []
    for title, names in _CURVES:
        series = {}
        for name in names:
            for label, key in _expand(name, rows):
                points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
                if len(points) > 1:
                    series[label] = points
        if series:
            figures.append(f"<figure><figcaption>{title}</figcaption>{_svg(series)}</figure>")
    return figures


def _expand(name: str, rows: list[dict]) -> list[tuple[str, str]]:
    if "*" not in name:
        return [("", name)]
    before, after = name.split("*")
    keys = sorted({k for r in rows for k in r if k.startswith(before) and k.endswith(after)})
    return [(k[len(before) : -len(after)], k) for k in keys]


def _scale(low: float, high: float, size: float, flip: bool) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda v: size - (v - low) / span * size if flip else (v - low) / span * size


def _svg(series: dict[str, list[tuple[int, float]]]) -> str:
    """Curves in a box of 300 x 120; the extremes stand beside it, the legend below, 4 a row."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    right, up = _scale(min(xs), max(xs), 300, False), _scale(min(ys), max(ys), 110, True)
    lines = []
    for i, (label, points) in enumerate(series.items()):
        path = " ".join(f"{right(x):.1f},{up(y) + 5:.1f}" for x, y in points)
        colour = _COLOURS[i % len(_COLOURS)]
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        if label:
            lines.append(_legend(4 + 84 * (i % 4), 148 + 14 * (i // 4), label, colour))
    height = 136 + (14 * -(-len(series) // 4) if any(series) else 0)
    return (
        f'<svg viewBox="0 0 350 {height}" role="img">{"".join(lines)}'
        f'<path d="M0 5V117H300" fill="none" stroke="#8886"/>'
        f'<text x="0" y="130" font-size="11">{min(xs)}</text>'
        f'<text x="150" y="130" font-size="11" text-anchor="middle">step</text>'
        f'<text x="300" y="130" font-size="11" text-anchor="end">{max(xs)}</text>'
        f'<text x="306" y="12" font-size="11">{max(ys):.3g}</text>'
        f'<text x="306" y="117" font-size="11">{min(ys):.3g}</text></svg>'
    )


def _legend(x: int, y: int, label: str, colour: str) -> str:
    return (
        f'<rect x="{x}" y="{y - 8}" width="8" height="8" fill="{colour}"/>'
        f'<text x="{x + 12}" y="{y}" font-size="11">{html.escape(label)}</text>'
    )


def _timing(rows: list[dict]) -> str:
    """Where a step's seconds go, as the mean of the last ten GRPO steps."""
    late = [r for r in rows if r.get("perf/rollout_seconds") is not None][-10:]
    if not late:
        return ""
    seconds = {p: sum(r.get(f"perf/{p}_seconds") or 0 for r in late) / len(late) for p in _PHASES}
    total = sum(seconds.values()) or 1.0
    bars = "".join(
        f'<span style="width:{100 * s / total:.1f}%;background:{_COLOURS[i]}" title="{p}"></span>'
        for i, (p, s) in enumerate(seconds.items())
    )
    words = " ".join(
        f'<span class="key"><i style="background:{_COLOURS[i]}"></i>'
        f"{p.replace('_', ' ')} {s:.2f} s</span>"
        for i, (p, s) in enumerate(seconds.items())
    )
    return f'<h2>A GRPO step: {total:.2f} s</h2><div class="bar">{bars}</div><p>{words}</p>'


def _heldout(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        tasks = sorted({k.split("/")[1] for k in row if k.startswith("heldout/")})
        for task in tasks:
            values = [
                row.get(f"heldout/{task}/{name}")
                for name in ("accuracy_greedy", "accuracy_sampled", "format")
            ]
            cells = "".join(f"<td>{'–' if v is None else f'{v:.3f}'}</td>" for v in values)
            when = f"{row['stage']} {row['step']}"
            lines.append(f"<tr><td>{html.escape(task)}</td><td>{when}</td>{cells}</tr>")
    if not lines:
        return ""
    return (
        '<h2>Held-out pictures</h2><div class="wide"><table><tr><th>task</th><th>step</th>'
        f"<th>greedy</th><th>sampled</th><th>form</th></tr>{''.join(lines)}</table></div>"
    )


def _rollouts(workdir: Path, rows: list[dict]) -> str:
    if not rows:
        return ""
    choices = []
    for name in ("task", "step"):
        values = ["all", *dict.fromkeys(str(row[name]) for row in rows)]
        options = "".join(f"<option>{html.escape(v)}</option>" for v in values)
        choices.append(f'<label>{name} <select id="{name}">{options}</select></label> ')
    articles = "".join(_article(workdir, row) for row in rows)
    return f"<h2>Rollouts</h2><p>{''.join(choices)}</p>{articles}"


def _article(workdir: Path, row: dict) -> str:
    pictures = "".join(
        f'<img src="{_data_uri(workdir / FOLDER / path)}" alt="">' for path in row["images"]
    )
    responses = "".join(
        f"<tr><td><pre>{html.escape(r['text'])}</pre></td><td>{r['reward']:.2f}</td>"
        f"<td>{r['advantage']:+.2f}</td></tr>"
        for r in row["responses"]
    )
    return (
        f'<article data-task="{html.escape(row["task"])}" data-step="{row["step"]}">'
        f"<h3>step {row['step']} · {html.escape(row['task'])} · answer "
        f"{html.escape(row['answer'])}</h3>{pictures}"
        f"<details><summary>question</summary><p>{html.escape(row['question'])}</p></details>"
        f'<div class="wide"><table><tr><th>response</th><th>reward</th><th>advantage</th></tr>'
        f"{responses}</table></div></article>"
    )


def _data_uri(path: Path) -> str:
    """A picture of at most 320 pixels a side as a JPEG data URI."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((_PICTURE, _PICTURE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
