"""Shows what will be asked: python -m spatial_ssrl_jax.preview --source=SPEC --out=DIR --count=N"""

import argparse
import html
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.errors import BadPicture, UserError, run_command
from spatial_ssrl_jax.run.models import claim_folder
from spatial_ssrl_jax.tasks import TASKS, TASKS_BY_NAME
from spatial_ssrl_jax.tasks.example import Example, Reject, Task

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
nav button { font: inherit; margin: 0 .4rem .4rem 0; padding: .2rem .8rem; }
nav button[aria-pressed=true] { font-weight: 700; outline: 2px solid currentColor; }
article { border-top: 1px solid var(--line); padding: 1rem 0; }
img { height: 14rem; max-width: 100%; object-fit: contain; margin: .2rem; image-rendering: auto; }
table { border-collapse: collapse; } td, th { padding: .1rem .8rem .1rem 0; text-align: left; }
pre { white-space: pre-wrap; font-size: .85rem; } .answer { font-weight: 700; }
"""
_SCRIPT = """
for (const b of document.querySelectorAll('nav button')) b.onclick = () => {
  for (const o of document.querySelectorAll('nav button')) o.setAttribute('aria-pressed', o === b);
  for (const a of document.querySelectorAll('article'))
    a.hidden = b.dataset.task !== 'all' && a.dataset.task !== b.dataset.task;
};
"""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.preview",
        description="Writes examples with their pictures, to look at and to read.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--source", required=True, help="for example scenes, folder:PATH, nyu:PATH")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--count", type=int, default=20, help="examples")
    parser.add_argument("--tasks", help="comma-separated; all that the source allows by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise UserError("--count must be at least 1.")

    source = open_source(args.source)
    tasks = _choose_tasks(args.tasks, source)
    inputs = [Path(source.root)] if hasattr(source, "root") else []
    claim_folder(args.out, args.overwrite, *inputs)
    (args.out / "images").mkdir(parents=True)
    examples, rejected = _make(source, tasks, args.count, args.seed)
    if not examples:
        reasons = "; ".join(f"{reason} ({n})" for reason, n in rejected.most_common(3))
        raise UserError(f"{args.source} gave no example at all: {reasons}.")
    rows = [_write(args.out, f"{i:05d}", example) for i, example in enumerate(examples)]
    lines = (json.dumps(row) + "\n" for row in rows)
    (args.out / "examples.jsonl").write_text("".join(lines))
    (args.out / "index.html").write_text(_page(args.source, rows, examples, rejected))
    counts = Counter(example.task for example in examples)
    if args.json:
        print(json.dumps({"out": str(args.out), "tasks": counts, "rejected": rejected}))
    else:
        made = ", ".join(f"{n} {task}" for task, n in counts.items())
        print(f"{args.out / 'index.html'}: {made}; {sum(rejected.values())} tries rejected")


def _choose_tasks(names: str | None, source) -> list[Task]:
    if names is None:
        return [task for task in TASKS if source.has_depth or not task.needs_depth]
    tasks = []
    for name in names.split(","):
        if name not in TASKS_BY_NAME:
            raise UserError(f"unknown task {name}: choose among {', '.join(TASKS_BY_NAME)}.")
        task = TASKS_BY_NAME[name]
        if task.needs_depth and not source.has_depth:
            raise UserError(
                f"the task {name} needs depth and {source.spec} has none: use a source with depth."
            )
        tasks.append(task)
    return tasks


def _make(source, tasks: list[Task], count: int, seed: int) -> tuple[list[Example], Counter]:
    """Examples of the tasks in turn over the records in turn, and the reasons of what gave none."""
    examples, rejected = [], Counter()
    for number in range(50 * count):
        if len(examples) == count:
            break
        task = tasks[len(examples) % len(tasks)]
        rng = np.random.default_rng((seed, number))
        try:
            record = source[int(rng.integers(len(source)))]
            examples.append(task.make(record, rng, task.settings()))
        except Reject as reason:
            rejected[f"{task.name}: {reason}"] += 1
        except BadPicture as reason:
            rejected[str(reason)] += 1
    return examples, rejected


def _write(out: Path, number: str, example: Example) -> dict:
    """Writes one example's pictures; returns its line of `examples.jsonl`."""
    paths = []
    for i, image in enumerate(example.images):
        paths.append(f"images/{number}_{i}.png")
        Image.fromarray(image).save(out / paths[-1])
    return {
        "id": number,
        "task": example.task,
        "question": example.question,
        "answer": example.answer,
        "images": paths,
        "source": example.source,
        "truth": example.truth,
    }


def _page(spec: str, rows: list[dict], examples: list[Example], rejected: Counter) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    buttons = "".join(
        f'<button data-task="{t}" aria-pressed="{str(t == "all").lower()}">{t}</button>'
        for t in ["all", *tasks]
    )
    kinds = Counter((example.task, example.kind) for example in examples)
    table = "".join(
        f"<tr><td>{html.escape(task)}</td><td>{html.escape(kind)}</td><td>{n}</td></tr>"
        for (task, kind), n in sorted(kinds.items())
    )
    reasons = "".join(f"<li>{html.escape(r)}: {n}</li>" for r, n in rejected.most_common())
    articles = "".join(_article(row, e) for row, e in zip(rows, examples, strict=True))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Preview of {html.escape(spec)}</title><style>{_STYLE}</style>"
        f"<h1>Preview of {html.escape(spec)}</h1><nav>{buttons}</nav>"
        f"<table><tr><th>task</th><th>kind</th><th>examples</th></tr>{table}</table>"
        + (
            f"<details><summary>Rejected tries</summary><ul>{reasons}</ul></details>"
            if reasons
            else ""
        )
        + f"{articles}<script>{_SCRIPT}</script></html>\n"
    )


def _article(row: dict, example: Example) -> str:
    pictures = "".join(
        f'<img src="{path}" alt="picture {i}" loading="lazy">'
        for i, path in enumerate(row["images"], 1)
    )
    return (
        f'<article data-task="{row["task"]}"><h2>{row["id"]} · {row["task"]} · '
        f"{html.escape(example.kind)}</h2>{pictures}<p>{html.escape(row['question'])}</p>"
        f'<p class="answer">{html.escape(row["answer"])}</p><p>{html.escape(example.reason)}</p>'
        "<details><summary>truth</summary>"
        f"<pre>{html.escape(json.dumps(row['truth'], indent=1))}</pre>"
        f"<pre>{html.escape(json.dumps(row['source'], indent=1))}</pre></details></article>"
    )


if __name__ == "__main__":
    run_command(main)
