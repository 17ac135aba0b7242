"""Scores and compares answers to benchmarks: python -m spatial_ssrl_jax.evaluate --score=FILE"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from spatial_ssrl_jax.errors import UserError, run_command
from spatial_ssrl_jax.eval.benchmarks import SPECS, open_benchmark, score_records
from spatial_ssrl_jax.eval.compare import compare, in_pairs
from spatial_ssrl_jax.eval.compare_report import COMPARISON, as_text, write_comparison_page
from spatial_ssrl_jax.eval.gallery import Questions
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
from spatial_ssrl_jax.eval.results_page import RESULTS, Result, write_results_page
from spatial_ssrl_jax.eval.scores import Scores

_COMPARED = "comparison.json"


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    if args.compare:
        return _compare(args)
    files = {path: read_predictions(path) for path in args.score}
    _check_apart(files)
    found: list[Result] = []
    # Several benchmarks would leave files of one name: each has a folder of its own.
    apart = args.out is not None and len(files) > 1
    if args.out:
        _check_out(args.out, (RESULTS,), args.overwrite)
    for path, records in files.items():
        out = args.out / records[0].benchmark if apart else args.out
        _check_out(out, (PREDICTIONS, SCORES, SUBMISSION), args.overwrite, path)
        if _for_server(records):
            _submit(records, out)
            continue
        kept = [r for r in records if r.target or not args.allow_missing]
        if len(kept) < len(records):
            print(f"{path}: {len(records) - len(kept)} left out, no target", file=sys.stderr)
        found.append(score_records(kept))
    if args.out and found:
        questions = _questions(args.data, [records for records, _ in found], args.allow_missing)
        for records, scores in found:
            write_results(args.out / scores.benchmark if apart else args.out, records, scores)
        write_results_page(args.out / RESULTS, found, questions)
    _print([scores for _, scores in found], len(files), args.json)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.evaluate",
        description="Scores the answers to a benchmark's questions, or compares two models' "
        "answers, without a model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--score",
        type=Path,
        nargs="+",
        help="a predictions.jsonl; of several benchmarks several, for one table",
    )
    what.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="two predictions.jsonl, or their folders, of one benchmark: how B differs from A",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder for {PREDICTIONS}, {SCORES} and {RESULTS} (of several benchmarks, folders); "
        f"with --compare for comparison.json and {COMPARISON}",
    )
    parser.add_argument(
        "--data", type=Path, help="the benchmark's files: their pictures go into the page"
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="leave out predictions without a target, questions that A or B alone has, and "
        "rows of --data whose pictures are missing",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results in --out")
    parser.add_argument(
        "--json",
        action="store_true",
        help='print scores.json; of several, {"scores": […]}; with --compare comparison.json',
    )
    args = parser.parse_args(argv)
    if args.data and not args.out:
        raise UserError("--data is for the pictures of a page: give --out=DIR for the page.")
    return args


def _check_apart(files: Mapping[Path, Sequence[Record]]) -> None:
    """Raises `UserError` where two files answer one benchmark: their results have one name."""
    names = [records[0].benchmark for records in files.values()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        both = [str(p) for p, name in zip(files, names, strict=True) if name == twice]
        raise UserError(
            f"{' and '.join(both)} hold answers to {twice}: score them one by one, or give two to "
            "--compare."
        )


def _compare(args: argparse.Namespace) -> None:
    paths = [_predictions_in(path) for path in args.compare]
    out = args.out
    for path in paths:
        _check_out(out, (COMPARISON, _COMPARED), args.overwrite, path)
    records = [read_predictions(path) for path in paths]
    a, b = in_pairs(*records, args.allow_missing)
    left = sum(map(len, records)) - len(a) - len(b)
    if left:
        print(f"{left} answers left out: only A or B has them", file=sys.stderr)
    found, names = compare(a, b), tuple(map(str, args.compare))
    if out:
        questions = _questions(args.data, [a], args.allow_missing)
        write_comparison_page(out / COMPARISON, found, names, questions)
        (out / _COMPARED).write_text(json.dumps(found.as_json(), indent=1) + "\n", "utf-8")
    print(json.dumps(found.as_json()) if args.json else as_text(found, names))


def _predictions_in(path: Path) -> Path:
    """A file, or that of a folder; raises `UserError` where it has none."""
    if not path.is_dir():
        return path
    if (path / PREDICTIONS).is_file():
        return path / PREDICTIONS
    below = sorted(found.parent.name for found in path.glob(f"*/{PREDICTIONS}"))
    here = f"; there is one in each of {', '.join(below)} below it" if below else ""
    raise UserError(f"{path} has no {PREDICTIONS}{here}: give the folder that has it.")


def _questions(
    data: Path | None, answers: Sequence[Sequence[Record]], allow_missing: bool
) -> Questions:
    """The questions of each benchmark's answers, for their pictures; none without `data`."""
    found = {}
    for records in answers if data else ():
        name = records[0].benchmark
        opened = open_benchmark(name, data, allow_missing)
        known = {(name, question.id): question for question in opened.questions}
        if not any((name, record.id) in known for record in records):
            raise UserError(
                f"{data} has none of the questions that were answered (the first is "
                f"{records[0].id}): give the --data that was asked."
            )
        found |= known
    return found


def _check_out(
    folder: Path | None, names: Sequence[str], overwrite: bool, read: Path | None = None
) -> None:
    """Raises `UserError` where results would replace others, or what they are made from."""
    for name in names if folder else ():
        path = folder / name
        if read is not None and path.exists() and path.resolve() == read.resolve():
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
