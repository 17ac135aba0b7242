"""Scores answers to benchmarks: python -m spatial_ssrl_jax.evaluate --score=predictions.jsonl"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from spatial_ssrl_jax.errors import UserError, run_command
from spatial_ssrl_jax.eval.benchmarks import SPECS, score_records
from spatial_ssrl_jax.eval.paper import VARIANT, comparable, published, table
from spatial_ssrl_jax.eval.predictions import (
    PREDICTIONS,
    SCORES,
    SUBMISSION,
    read_predictions,
    write_results,
    write_submission,
)
from spatial_ssrl_jax.eval.question import Record
from spatial_ssrl_jax.eval.scores import Scores


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    files = {path: read_predictions(path) for path in args.score}
    found = []
    for path, records in files.items():
        # Several benchmarks would leave files of one name: each has a folder of its own.
        out = args.out / records[0].benchmark if args.out and len(files) > 1 else args.out
        _check_out(out, args.overwrite, path)
        if _for_server(records):
            _submit(records, out)
            continue
        kept = [r for r in records if r.target or not args.allow_missing]
        if len(kept) < len(records):
            print(f"{path}: {len(records) - len(kept)} left out, no target", file=sys.stderr)
        scored, scores = score_records(kept)
        if out:
            write_results(out, scored, scores)
        found.append(scores)
    _print(found, len(files), args.json)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.evaluate",
        description="Scores the answers to a benchmark's questions, without a model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--score",
        type=Path,
        nargs="+",
        required=True,
        help="a predictions.jsonl; of several benchmarks several, for one table",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for predictions.jsonl and scores.json (of several, folders)",
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="leave out predictions without a target"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results in --out")
    parser.add_argument(
        "--json", action="store_true", help='print scores.json; of several, {"scores": […]}'
    )
    return parser.parse_args(argv)


def _check_out(folder: Path | None, overwrite: bool, read: Path) -> None:
    """Raises `UserError` where results would replace others, or what they are made from."""
    for name in (PREDICTIONS, SCORES, SUBMISSION) if folder else ():
        path = folder / name
        if path.exists() and path.resolve() == read.resolve():
            raise UserError(f"{path} is what is read: choose another folder for --out.")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists: choose another folder or give --overwrite.")


def _for_server(records: Sequence[Record]) -> bool:
    """Whether the answers are for a benchmark's server, which alone knows what is right."""
    private = {name for name, spec in SPECS.items() if not spec.public}
    return all(r.target is None and r.benchmark in private for r in records)


def _submit(records: Sequence[Record], folder: Path | None) -> None:
    if folder is None:
        raise UserError(
            f"the right answers of {records[0].benchmark}'s test split are not public: give "
            f"--out=DIR for its {SUBMISSION}, or score the dev split."
        )
    path = folder / SUBMISSION
    write_submission(path, records)
    count = f"{len(records)} answers without a public target"
    print(f"{path}: {count}, not scored", file=sys.stderr)


def _print(found: Sequence[Scores], files: int, as_json: bool) -> None:
    if as_json:
        whole = [scores.as_json() for scores in found]
        print(json.dumps(whole[0] if files == len(whole) == 1 else {"scores": whole}))
    elif len(found) == 1:
        print(_report(found[0]))
    elif found:
        titles = {name: spec.title for name, spec in SPECS.items()}
        ours = {scores.benchmark: comparable(scores) for scores in found}
        print("\n".join([*map(_headline, found), "", table(ours, titles)]))


def _headline(scores: Scores) -> str:
    low, high = scores.ci95
    return (
        f"{SPECS[scores.benchmark].title}: {scores.score:.2f} [{low:.2f}, {high:.2f}], "
        f"{scores.count} questions, {scores.unparsed} without an answer that can be read (wrong)"
    )


def _report(scores: Scores) -> str:
    """The score with its interval, its categories, and the paper's figures."""
    lines = [_headline(scores)]
    lines += [f"  {name}: {value:.2f}" for name, value in scores.extra.items()]
    width = max(map(len, scores.categories))
    lines += [
        f"  {name:{width}}  {found['score']:6.2f}  of {found['count']}"
        for name, found in scores.categories.items()
    ]
    variant = VARIANT.get(scores.benchmark)
    lines.append(f"the paper{f' (compare {variant!r} above)' if variant else ''}:")
    lines += [f"  {model}: {value:.2f}" for model, value in published(scores.benchmark).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
