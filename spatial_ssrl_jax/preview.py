"""Shows training examples: python -m spatial_ssrl_jax.preview --source=SPEC --out=DIR --count=N"""

import argparse
import html
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from spatial_ssrl_jax.common.errors import BadImage, UserError, run_command
from spatial_ssrl_jax.common.html import filters, page, table
from spatial_ssrl_jax.common.outputs import atomic_folder, check_output_folder
from spatial_ssrl_jax.common.text import printable
from spatial_ssrl_jax.data.sources import AnySource, open_source
from spatial_ssrl_jax.data.sources.mixture import source_notes
from spatial_ssrl_jax.data.sources.parquet import write_questions
from spatial_ssrl_jax.tasks.example import Example, Reject, Task

if TYPE_CHECKING:
    from spatial_ssrl_jax.config.schema import Config
    from spatial_ssrl_jax.data.task_sources import TaskSource

Row = dict[str, Any]  # a line of `examples.jsonl`, or a row of `examples.parquet`


def main(argv: Sequence[str]) -> None:
    args, config = _parse(argv)
    # Imports that take seconds come after the options are checked.
    from spatial_ssrl_jax.data.depth_direction import depth_warnings
    from spatial_ssrl_jax.data.task_sources import source_shares

    source = open_source(config.data.source, config.data.reading, config.all_tasks)
    chosen = _choose_tasks(args.tasks, source, config)
    tasks = {task.name: found for task, found in chosen.items()}
    shares = {name: source_shares(found) for name, found in tasks.items()}
    check_output_folder(args.out, args.overwrite, *source.inputs)
    examples, tries, rejected = _make(tasks, args.count, args.seed)
    if not examples:
        reasons = "; ".join(f"{reason} ({n})" for reason, n in rejected.most_common(3))
        raise UserError(
            f"{source.spec} gave no example at all ({reasons}): use other images or --tasks."
        )
    warnings = [*source_notes(source), *depth_warnings(source, chosen)]
    with atomic_folder(args.out, args.overwrite, source.inputs) as out:
        (out / "images").mkdir()
        rows = [_write(out, f"{i:05d}", example) for i, example in enumerate(examples)]
        lines = (json.dumps(row) + "\n" for row in rows)
        (out / "examples.jsonl").write_text("".join(lines))
        kinds = {t.name: getattr(config.tasks[t.name], "kinds", {}) for t in chosen}
        statistics = _statistics(examples, tries, rejected, shares, kinds)
        statistics = "".join(f"<p><b>{html.escape(w)}.</b></p>" for w in warnings) + statistics
        (out / "index.html").write_text(_page(source.spec, rows, examples, statistics))
        if args.parquet:
            write_questions(out / "examples.parquet", [_released_row(out, r) for r in rows])
    counts = Counter(example.task for example in examples)
    if args.json:
        report = {"out": str(args.out), "tasks": counts, "tries": tries, "rejected": rejected}
        print(json.dumps(report | {"sources": shares, "warnings": warnings}))
    else:
        made = ", ".join(f"{n} {task}" for task, n in counts.items())
        line = f"{args.out / 'index.html'}: {made}; {sum(rejected.values())} tries rejected"
        print(printable(line))
        for warning in warnings:
            print(printable(f"warning: {warning}"), file=sys.stderr)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, "Config"]:
    """The options, and a config with the source, how it is read, and the tasks' settings."""
    from spatial_ssrl_jax.config.load import load_config, split_overrides, with_overrides
    from spatial_ssrl_jax.config.schema import Config

    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.preview",
        description="Writes examples with their images, to look at and to read.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="--config.tasks.TASK.NAME=VALUE overrides a task's setting.",
    )
    parser.add_argument("--source", help="for example folder:PATH or rgbd:PATH,depth=inverse")
    parser.add_argument("--config", help="a Python file whose source and tasks' settings are used")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--count", type=int, default=20, help="examples")
    parser.add_argument("--tasks", help="comma-separated; all that the source allows by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--parquet",
        action="store_true",
        help="also write examples.parquet in the released data's format, for other trainers",
    )
    parser.add_argument(
        "--allow-outside-paths",
        action="store_true",
        help="let paths in question files leave the folder of --source",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    rest, overrides = split_overrides(argv)
    args = parser.parse_args(rest)
    if args.count < 1:
        raise UserError("--count must be at least 1.")
    if args.seed < 0:
        raise UserError("--seed must be at least 0.")
    if args.source is None and args.config is None:
        parser.error("the following arguments are required: --source, or --config")
    config = with_overrides(load_config(args.config) if args.config else Config("x"), overrides)
    data = replace(config.data, source=args.source or config.data.source)
    if args.allow_outside_paths:
        data = replace(data, allow_outside_paths=True)
    return args, replace(config, data=data)


def _choose_tasks(
    names: str | None, source: AnySource, config: "Config"
) -> dict[Task[Any], list["TaskSource"]]:
    """The source's examples for each of the tasks in `names`, or for all that it can serve."""
    from spatial_ssrl_jax.data.task_sources import task_sources, trained_tasks, unusable

    wanted = trained_tasks(config.task_settings)
    known = {task.name: task for task in config.all_tasks}
    if names is not None:
        for name in names.split(","):
            if name not in known:
                raise UserError(f"unknown task {name}: choose among {', '.join(known)}.")
        wanted = [known[name] for name in names.split(",")]
    chosen = {}
    for task in wanted:
        found = task_sources(source, range(len(source)), task, config.tasks[task.name])
        if found:
            chosen[task] = found
        elif names is not None:
            raise UserError(unusable(source, task) + ": use another source.")
    return chosen


def _make(
    tasks: dict[str, list["TaskSource"]], count: int, seed: int
) -> tuple[list[Example], Counter[str], Counter[str]]:
    """Examples of the tasks in turn, from records drawn at random.

    Returns:
      The examples, the tries of each task, and the rejected tries of each reason.
    """
    examples: list[Example] = []
    tries: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    names = list(tasks)
    for number in range(50 * count):
        if len(examples) == count:
            break
        name = names[len(examples) % len(names)]
        rng = np.random.default_rng((seed, number))
        tries[name] += 1
        source = _choose(tasks[name], rng)
        try:
            index = source.indices[int(rng.integers(len(source.indices)))]
            examples.append(source.maker(index, rng))
        except Reject as reason:
            rejected[f"{name}: {reason}"] += 1
        except BadImage as reason:
            rejected[str(reason)] += 1
    return examples, tries, rejected


def _choose(sources: list["TaskSource"], rng: np.random.Generator) -> "TaskSource":
    if len(sources) == 1:
        return sources[0]
    weights = np.array([source.weight for source in sources])
    return sources[int(rng.choice(len(sources), p=weights / weights.sum()))]


def _write(out: Path, number: str, example: Example) -> Row:
    """Writes one example's images; returns its line of `examples.jsonl`."""
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


def _released_row(out: Path, row: Row) -> Row:
    """A line of `examples.jsonl` as a row of the released parquet, its images inside.

    Each image is named by the record that it was made of, so that `ssrl81k:` can group them.
    """
    record = row["source"]["record"].replace("#", "_")
    images = [
        {"bytes": (out / path).read_bytes(), "path": f"{record}#{Path(path).name}"}
        for path in row["images"]
    ]
    return {"problem": row["question"], "answer": row["answer"], "images": images}


def _page(spec: str, rows: list[Row], examples: list[Example], statistics: str) -> str:
    choices = {
        "task": dict.fromkeys(example.task for example in examples),
        "kind": dict.fromkeys(example.kind for example in examples),
    }
    articles = "".join(_article(row, e) for row, e in zip(rows, examples, strict=True))
    title = f"Preview of {spec}"
    body = f"<h1>{html.escape(title)}</h1>{statistics}<h2>Examples</h2>{filters(choices)}{articles}"
    return page(title, body, ("filter.js",))


def _statistics(
    examples: list[Example],
    tries: Counter[str],
    rejected: Counter[str],
    shares: dict[str, dict[str, float]],
    weights: dict[str, dict[str, float]],
) -> str:
    """Tables: sources, accepted tries and kinds of each task, gaps in depth, rejected tries."""
    made = Counter(example.task for example in examples)
    counts = Counter((e.task, e.kind) for e in examples)
    for task in {e.task for e in examples if e.kind != "released"}:
        for kind in (kind for kind, weight in weights[task].items() if weight):
            counts[task, kind] += 0  # kinds without an example are listed too
    kinds = sorted(counts.items())
    per_task = [
        (task, tries[task], made[task], f"{made[task] / tries[task]:.0%}") for task in tries
    ]
    per_kind = [(task, kind, n, f"{n / made[task]:.0%}") for (task, kind), n in kinds]
    per_source = [
        (task, spec, f"{share:.0%}")
        for task, sources in shares.items()
        for spec, share in sources.items()
    ]
    parts = [
        ("Sources", ("task", "source", "fraction of task"), per_source),
        ("Tries", ("task", "tries", "examples", "accepted"), per_task),
        ("Kinds", ("task", "kind", "examples", "fraction of task"), per_kind),
        ("Gaps of the depth task", _GAPS, _gap_rows(examples)),
        ("Rejected tries", ("reason", "tries"), rejected.most_common()),
    ]
    return "".join(f"<h2>{title}</h2>{table(head, rows)}" for title, head, rows in parts if rows)


_GAPS = ("smaller gap between means of neighbours", "examples", "fraction")


def _gap_rows(examples: list[Example]) -> list[tuple[str, int, str]]:
    """How many depth examples have their smaller gap, between means of regions, in each tenth."""
    depths = [sorted(e.truth["depths"]) for e in examples if e.task == "depth" and e.truth]
    gaps = [min(b - a for a, b in pairwise(found)) for found in depths]
    ends = (0.0, 0.1, 0.2, 0.3, 0.5)
    counts = np.histogram(gaps, ends)[0].tolist()
    return [
        (f"{low} to {high}", n, f"{n / len(gaps):.0%}")
        for low, high, n in zip(ends, ends[1:], counts, strict=False)
        if gaps
    ]


def _article(row: Row, example: Example) -> str:
    images = "".join(
        f'<figure><img src="{path}" alt="image {i}" loading="lazy">'
        f"<figcaption>{i}</figcaption></figure>"
        for i, path in enumerate(row["images"], 1)
    )
    details = json.dumps({"truth": row["truth"], "source": row["source"]}, indent=1)
    kind = html.escape(example.kind)
    return (
        f'<article data-task="{row["task"]}" data-kind="{kind}">'
        f'<h3>{row["id"]} · {row["task"]} · {kind}</h3><div class="images">{images}</div>'
        f"<p>{html.escape(row['question'])}</p><p><b>{html.escape(row['answer'])}</b></p>"
        f'<p class="soft">{html.escape(example.reason)}</p>'
        f"<details><summary>truth</summary><pre>{html.escape(details)}</pre></details></article>"
    )


if __name__ == "__main__":
    run_command(main)
