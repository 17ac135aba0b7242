"""Scoring and comparing answers that are there already, without a model."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.paths import write_atomic
from spatial_ssrl_jax.eval.benchmarks.registry import for_server, score_predictions
from spatial_ssrl_jax.eval.predictions import (
    PREDICTIONS,
    SCORES,
    SUBMISSION,
    predictions_in,
    read_predictions,
    submit,
    write_results,
)
from spatial_ssrl_jax.eval.questions import Prediction
from spatial_ssrl_jax.eval.reports.comparison_page import (
    COMPARED,
    COMPARISON,
    as_text,
    write_comparison_page,
)
from spatial_ssrl_jax.eval.reports.gallery import questions_in
from spatial_ssrl_jax.eval.reports.results_page import RESULTS, Result, write_results_page
from spatial_ssrl_jax.eval.reports.text import print_scores
from spatial_ssrl_jax.eval.scoring.compare import compare, in_pairs


def score_files(args: argparse.Namespace) -> None:
    """Scores the files `args.score`, and writes scores and a page into `args.out`, if given.

    Raises:
      UserError: a file is damaged, or its results have no place.
    """
    files = {path: read_predictions(path) for path in args.score}
    _check_apart(files)
    found: list[Result] = []
    # Several benchmarks would leave files of one name: each has a folder of its own.
    apart = args.out is not None and len(files) > 1
    for path, records in files.items():
        out = args.out / records[0].benchmark if apart else args.out
        _check_out(out, (PREDICTIONS, SCORES, SUBMISSION), args.overwrite, path)
        if for_server(records):
            if out is None:
                raise UserError(
                    f"the right answers of {records[0].benchmark}'s test split are not public: "
                    f"give --out=DIR for its {SUBMISSION}, or score the dev split."
                )
            submit(records, out, partial(print, file=sys.stderr))
            continue
        kept = [r for r in records if r.target or not args.allow_missing]
        if len(kept) < len(records):
            print(f"{path}: {len(records) - len(kept)} left out, no target", file=sys.stderr)
        found.append(score_predictions(kept))
    if args.out and found:
        _check_out(args.out, (RESULTS,), args.overwrite)
        questions = questions_in(args.data, [records for records, _ in found], args.allow_missing)
        for records, scores in found:
            write_results(args.out / scores.benchmark if apart else args.out, records, scores)
        write_results_page(args.out / RESULTS, found, questions)
    print_scores([scores for _, scores in found], len(files) > 1, args.json)


def compare_files(args: argparse.Namespace) -> None:
    """Compares both of `args.compare`, and writes what changed into `args.out`, if given.

    Raises:
      UserError: they cannot be compared.
    """
    paths = [predictions_in(path) for path in args.compare]
    _check_out(args.out, (COMPARISON, COMPARED), args.overwrite)
    records = [read_predictions(path) for path in paths]
    a, b = in_pairs(*records, args.allow_missing)
    left = sum(map(len, records)) - len(a) - len(b)
    if left:
        print(f"answers left out, as only A or B has them: {left}", file=sys.stderr)
    found, names = compare(a, b), tuple(map(str, args.compare))
    if args.out:
        questions = questions_in(args.data, [a], args.allow_missing)
        write_comparison_page(args.out / COMPARISON, found, names, questions)
        write_atomic(args.out / COMPARED, json.dumps(found.as_json(), indent=1) + "\n")
    print(json.dumps(found.as_json()) if args.json else as_text(found, names))


def _check_apart(files: Mapping[Path, Sequence[Prediction]]) -> None:
    """Raises `UserError` where two files answer one benchmark: their results have one name."""
    names = [records[0].benchmark for records in files.values()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        both = [str(p) for p, name in zip(files, names, strict=True) if name == twice]
        raise UserError(
            f"{' and '.join(both)} hold answers to {twice}: score them one by one, or give two to "
            "--compare."
        )


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
