"""`report.html`: one file that needs no server, rewritten during the run."""

import html
import json
import re
import time
from typing import Any

from etils import epath

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.html import filters, image_uri, page, table
from spatial_ssrl_jax.common.json_file import JsonObject
from spatial_ssrl_jax.common.paths import read_files, write_atomic
from spatial_ssrl_jax.data.images import open_image
from spatial_ssrl_jax.eval.benchmarks.registry import SPECS
from spatial_ssrl_jax.monitoring.metrics import read_metrics
from spatial_ssrl_jax.monitoring.rollout_samples import FOLDER, read_rollouts
from spatial_ssrl_jax.tasks import TASKS_BY_NAME
from spatial_ssrl_jax.trainer.curves import COLOURS, figure, legend

MetricRows = list[dict[str, Any]]

_FILES = 12  # files of rollout samples on the page, spread over the run
_CURVES = (  # title, and the metrics drawn together; * stands for every name that there is
    ("Reward", {"": "reward/overall_mean"}),
    ("Parts of the reward", {"*": "reward/part/*"}),
    ("Accuracy per task", {"*": "task/*/accuracy"}),
    ("Held-out accuracy, greedy", {"*": "heldout/*/accuracy_greedy"}),
    ("Benchmark score", {"*": "benchmark/*/score"}),
    (
        "Response length (tokens)",
        {
            "longest": "response/length_max",
            "mean": "response/length_mean",
            "shortest": "response/length_min",
        },
    ),
    ("KL to the reference (nats a token)", {"": "kl/mean"}),
    ("Entropy (nats a token)", {"": "policy/entropy"}),
    ("Groups without variance in reward", {"": "advantage/zero_variance_share"}),
    ("Supervised loss", {"": "loss/sft"}),
    ("Gradient norm", {"": "optim/gradient_norm"}),
    ("Sampler against trainer (nats a token)", {"mean": "mismatch/logprob_mean"}),
)
_PHASES = ("rollout", "reward", "refill", "reference", "update", "input_wait")
_TILES = (  # metric of the newest step, its label, and its number format
    ("reward/overall_mean", "reward", "{:.3f}"),
    ("reward/accuracy_mean", "accuracy", "{:.3f}"),
    ("loss/sft", "loss", "{:.4f}"),
    ("response/length_mean", "response tokens", "{:.0f}"),
    ("kl/mean", "KL", "{:.4f}"),
    ("policy/entropy", "entropy", "{:.3f}"),
    ("perf/step_seconds", "seconds a step", "{:.2f}"),
    ("perf/tokens_per_second", "tokens/s", "{:,.0f}"),
    ("memory/host_bytes", "host memory", "{:,.2f} GB"),
    ("memory/device_bytes", "device memory", "{:,.2f} GB"),
)
_LABELS = {"untrained": "untrained", "sft": "SFT", "grpo": "GRPO"}


def write_report(workdir: epath.PathLike, config: dict[str, Any], title: str) -> None:
    """Writes the report from the files in the run's folder.

    Args:
      workdir: the run's folder, with `metrics.jsonl` and `rollouts/`.
      config: the config as plain types.
      title: the run's name.
    """
    rows = read_metrics(workdir)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _summary(config, rows),
        _tiles(rows),
        *(f'<p class="warning">{html.escape(w)}</p>' for w in warnings(rows)),
        f'<div class="curves">{"".join(_curves(rows))}</div>',
        _timing(rows),
        _heldout(rows),
        _benchmark(rows),
        _rollouts(epath.Path(workdir), read_rollouts(workdir, _FILES)),
        f"<details><summary>Config</summary><pre>{html.escape(json.dumps(config, indent=1))}</pre>"
        "</details>",
    ]
    whole = page(title, "".join(parts), ("curves.js", "filter.js"))
    write_atomic(epath.Path(workdir) / "report.html", whole)


def warnings(rows: list[dict[str, Any]]) -> list[str]:
    """Problems that the metrics show, as sentences."""
    grpo = [r for r in rows if r["stage"] == "grpo" and "reward/overall_mean" in r]
    if len(grpo) < 10:
        return []
    found, late = [], grpo[-5:]

    def mean(name: str, steps: MetricRows) -> float:
        values = [r[name] for r in steps if r.get(name) is not None]
        return sum(values) / len(values) if values else 0.0

    def check(broken: bool, text: str) -> None:
        if broken:
            found.append(text)

    early = grpo[:5]
    flat = mean("advantage/zero_variance_share", late)
    check(
        flat > 0.8, f"{flat:.0%} of the groups have no variance in reward: they give no gradient."
    )
    entropy = mean("policy/entropy", late), mean("policy/entropy", early)
    check(entropy[0] < 0.1 * entropy[1], "The entropy is below a tenth of its first value.")
    length = mean("response/length_mean", late), mean("response/length_mean", early)
    check(length[0] < 0.3 * length[1], "Responses are shorter than a third of the first ones.")
    gap, before = mean("mismatch/logprob_mean", late), mean("mismatch/logprob_mean", early)
    grown = f", {gap / before:.0f} times the first value" if gap > 3 * before > 0 else ""
    check(
        gap > 0.05 or bool(grown and gap > 0.005),
        f"Sampler and trainer differ by {gap:.3f} nats a token{grown}.",
    )
    clipped = mean("response/clipped_share", late)
    check(clipped > 0.2, f"{clipped:.0%} of the responses are truncated at the limit.")
    dropped = mean("prompt/dropped", late)
    kept = sum(mean(f"task/{task}/count", late) for task in _tasks(late, "task"))
    check(
        dropped > kept > 0,
        f"Of {dropped + kept:.0f} prompts a step {dropped:.0f} are dropped: they are too "
        "long, or their image yields no example.",
    )
    skipped = sum(r.get("optim/skipped") or 0 for r in grpo)
    check(skipped > 0, f"{skipped:.0f} updates were skipped because of a non-finite gradient.")
    return found


def _label(stage: str) -> str:
    return _LABELS.get(stage, stage)


def _summary(config: dict[str, Any], rows: MetricRows) -> str:
    """The model, its data, the progress, and the time of the newest step."""
    trained = [name for name, task in config["tasks"].items() if task["weight"] > 0]
    model = config["model"]["path"] + (" from scratch" if config["model"]["from_scratch"] else "")
    total = config["sft"]["steps"] + config["grpo"]["steps"]
    text = f"{model} on {config['data']['source']}: {', '.join(trained)}."
    where = "Not started."
    if rows:
        stage, step = rows[-1]["stage"], rows[-1]["step"]
        where = f"{_label(stage)}, step {step} of {total}. "
        where += time.strftime("Newest step at %Y-%m-%d %H:%M UTC.", time.gmtime(rows[-1]["time"]))
    return f'<p>{html.escape(text)}</p><p class="soft">{where}</p>'


def _tiles(rows: MetricRows) -> str:
    if not rows:
        return ""
    cells = []
    for key, name, style in _TILES:
        value = rows[-1].get(key)
        if value is not None:
            value = value / 1e9 if key.startswith("memory/") else value
            cells.append(f"<div><dt>{name}</dt><dd>{style.format(value)}</dd></div>")
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _curves(rows: MetricRows) -> list[str]:
    starts: dict[str, int] = {}
    for row in rows:
        starts.setdefault(_label(row["stage"]), row["step"])
    figures = []
    for title, names in _CURVES:
        series = {}
        for label, key in _expanded(names, rows).items():
            points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            if len(points) > 1:
                series[label] = points
        if series:
            figures.append(figure(title, series, starts))
    return figures


def _expanded(names: dict[str, str], rows: MetricRows) -> dict[str, str]:
    """Metrics by label, with * replaced by each name in the rows; known tasks come first."""
    found = {}
    known = {name: None for row in rows for name in row}  # in order
    first = list(TASKS_BY_NAME)
    for label, key in names.items():
        before, star, after = key.partition("*")
        each = [
            name[len(before) : len(name) - len(after)]
            for name in known
            if star and name.startswith(before) and name.endswith(after)
        ]
        each.sort(key=lambda name: first.index(name) if name in first else len(first))
        for name in each if star else ([""] if key in known else []):
            found[name or label] = key.replace("*", name)
    return found


def _tasks(rows: MetricRows, prefix: str) -> list[str]:
    """The tasks in the names of metrics, those of the package first."""
    found = dict.fromkeys(
        name.split("/")[1] for row in rows for name in row if name.startswith(f"{prefix}/")
    )
    known = [task for task in TASKS_BY_NAME if task in found]
    own = [task for task in found if task not in known and not task.startswith("questions_")]
    return known + [task for task in own if task != "mean"]


def _timing(rows: MetricRows) -> str:
    """The seconds of each phase of a step, as the mean of the last ten GRPO steps."""
    late = [r for r in rows if r.get("perf/rollout_seconds") is not None][-10:]
    if not late:
        return ""
    seconds = {p: sum(r.get(f"perf/{p}_seconds") or 0 for r in late) / len(late) for p in _PHASES}
    seconds = {p.replace("_", " "): s for p, s in seconds.items() if s}
    whole = sum(r.get("perf/step_seconds") or 0 for r in late) / len(late)
    seconds["other"] = max(whole - sum(seconds.values()), 0.0)
    total = sum(seconds.values()) or 1.0
    bars = "".join(
        f'<span style="width:{100 * s / total:.1f}%;background:var(--s{i % COLOURS})" '
        f'title="{p}"></span>'
        for i, (p, s) in enumerate(seconds.items())
    )
    words = legend([f"{p} {s:.2f} s" for p, s in seconds.items()])
    return (
        f'<h2>A GRPO step: {total:.2f} s <span class="soft">mean of {len(late)}</span></h2>'
        f'<div class="bar">{bars}</div><p>{words}</p>'
    )


def _heldout(rows: MetricRows) -> str:
    """The newest held-out metrics of each stage, one line for each task."""
    measured = [row for row in rows if any(k.startswith("heldout/") for k in row)]
    newest = {row["stage"] if row["step"] else "untrained": row for row in measured}
    if not newest:
        return ""
    head = ["task"]
    for stage, row in newest.items():
        name = f"{_label(stage)}, step {row['step']}"
        head += [f"{name}: greedy", "sampled", "format"]
    head += ["chance", "grey images"]
    lines = []
    for task in _tasks(measured, "heldout"):
        values = [
            row.get(f"heldout/{task}/{name}")
            for row in newest.values()
            for name in ("accuracy_greedy", "accuracy_sampled", "format")
        ]
        values += [
            next((row[key] for row in measured[::-1] if key in row), None)
            for key in (f"heldout/{task}/chance", f"heldout/{task}/accuracy_grey")
        ]
        if any(value is not None for value in values):
            lines.append([task, *("–" if v is None else f"{v:.3f}" for v in values)])
    return f"<h2>Held-out images</h2>{table(head, lines)}"


def _benchmark(rows: MetricRows) -> str:
    """The newest score of each stage and the best one, one line each."""
    name = next((k for row in rows for k in row if re.fullmatch(r"benchmark/\w+/score", k)), None)
    if name is None:
        return ""
    measured = [row for row in rows if row.get(name) is not None]
    if not measured:
        return ""
    newest = {row["stage"] if row["step"] else "untrained": row for row in measured}
    lines = [
        (f"{_label(stage)}, step {row['step']}", f"{row[name]:.2f}")
        for stage, row in newest.items()
    ]
    trained = [row for row in measured if row["step"]]
    if trained:
        best = max(trained, key=lambda row: row[name])
        lines.append((f"best, step {best['step']}", f"{best[name]:.2f}"))
    return f"<h2>{html.escape(SPECS[name.split('/')[1]].title)}</h2>{table(('', 'score'), lines)}"


def _rollouts(workdir: epath.Path, rows: MetricRows) -> str:
    rows = list(filter(_is_whole, rows))
    if not rows:
        return ""
    choices = {
        "task": dict.fromkeys(row["task"] for row in rows),
        "step": dict.fromkeys(row["step"] for row in rows),
        "answers": dict.fromkeys(_answers(row) for row in rows),
    }
    paths = (workdir / FOLDER / path for row in rows for path in row["images"])
    images = iter(read_files(paths, skip=True))
    articles = "".join(_article(row, [next(images) for _ in row["images"]]) for row in rows)
    return f"<h2>Rollouts</h2>{filters(choices)}{articles}"


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether a row has all that the page shows of it; a damaged one is left out."""
    values = JsonObject(row, FOLDER)
    try:
        values.get("step", int)
        values.items("images", str)
        for key in ("task", "kind", "question", "answer"):
            values.get(key, str)
        for response in values.items("responses", dict):
            found = JsonObject(response, FOLDER)
            found.get("text", str)
            for key in ("reward", "accuracy", "advantage", "length"):
                found.get(key, float)
    except UserError:
        return False
    return True


def _answers(row: dict[str, Any]) -> str:
    """Whether the answers of a group are all right, all wrong or mixed."""
    right = sum(response["accuracy"] > 0 for response in row["responses"])
    return "all wrong" if not right else "mixed" if right < len(row["responses"]) else "all right"


def _article(row: dict[str, Any], files: list[bytes]) -> str:
    """One prompt with its images and responses."""
    images = "".join(_image(file) for file in files)
    responses = "".join(
        f'<div class="response {"right" if r["accuracy"] > 0 else "wrong"}">'
        f"<div><b>{r['reward']:.2f}</b><small>{r['advantage']:+.2f} advantage</small>"
        f"<small>{r['length']} tokens</small></div><pre>{html.escape(r['text'])}</pre></div>"
        for r in row["responses"]
    )
    task = html.escape(row["task"])
    return (
        f'<article data-task="{task}" data-step="{row["step"]}" data-answers="{_answers(row)}">'
        f"<h3>step {row['step']} · {task} · {html.escape(row['kind'])} · answer "
        f'{html.escape(row["answer"])}</h3><div class="images">{images}</div>'
        f"<details><summary>question</summary><pre>{html.escape(row['question'])}</pre></details>"
        f"{responses}</article>"
    )


def _image(file: bytes) -> str:
    """An image of the page; nothing where its file is damaged."""
    try:
        return f'<img src="{image_uri(open_image(file))}" alt="">'
    except BadImage:
        return ""
