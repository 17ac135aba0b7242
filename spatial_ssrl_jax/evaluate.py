"""Scores answers to benchmarks: python -m spatial_ssrl_jax.evaluate --score=predictions.jsonl"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from spatial_ssrl_jax.errors import UserError, run_command
from spatial_ssrl_jax.eval.benchmarks import SPECS, score_records
from spatial_ssrl_jax.eval.paper import VARIANT, published
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
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.evaluate",
        description="Scores the answers to a benchmark's questions, without a model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--score", type=Path, required=True, help="a predictions.jsonl")
    parser.add_argument("--out", type=Path, help="folder for predictions.jsonl and scores.json")
    parser.add_argument(
        "--allow-missing", action="store_true", help="leave out predictions without a target"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results in --out")
    parser.add_argument("--json", action="store_true", help="print scores.json")
    args = parser.parse_args(argv)
    _check_out(args.out, args.overwrite, args.score)
    records = read_predictions(args.score)
    if _for_server(records):
        _submit(records, args.out, args.json)
        return
    kept = [r for r in records if r.target or not args.allow_missing]
    scored, scores = score_records(kept)
    if args.out:
        write_results(args.out, scored, scores)
    if len(kept) < len(records):
        print(f"{len(records) - len(kept)} left out: they have no target", file=sys.stderr)
    print(json.dumps(scores.as_json()) if args.json else _report(scores))


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


def _submit(records: Sequence[Record], folder: Path | None, as_json: bool) -> None:
    if folder is None:
        raise UserError(
            f"the right answers of {records[0].benchmark}'s test split are not public: give "
            f"--out=DIR for its {SUBMISSION}, or score the dev split."
        )
    path = folder / SUBMISSION
    write_submission(path, records)
    count = f"{len(records)} answers without a public target"
    print(json.dumps({"submission": str(path)}) if as_json else f"{path}: {count}, not scored")


def _report(scores: Scores) -> str:
    """The score with its interval, its categories, and the paper's rows."""
    low, high = scores.ci95
    lines = [
        f"{SPECS[scores.benchmark].title}: {scores.score:.2f} [{low:.2f}, {high:.2f}], "
        f"{scores.count} questions, {scores.unparsed} without an answer that can be read (wrong)"
    ]
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
