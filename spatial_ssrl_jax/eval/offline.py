"""Offline scoring: scores and compares stored predictions, without a model."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.paths import write_atomic
from spatial_ssrl_jax.common.text import printable
from spatial_ssrl_jax.eval.benchmarks.registry import for_server, score_predictions
from spatial_ssrl_jax.eval.matching import tool_predictions
from spatial_ssrl_jax.eval.other_tools import LMMS, read_tool_answers, tool_of
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
from spatial_ssrl_jax.eval.reports.gallery import Questions, questions_in
from spatial_ssrl_jax.eval.reports.results_page import RESULTS, Result, write_results_page
from spatial_ssrl_jax.eval.reports.text import print_scores
from spatial_ssrl_jax.eval.scoring.compare import compare, in_pairs


def score_files(args: argparse.Namespace) -> None:
    """Scores the files `args.score`, and writes scores and a page into `args.out`, if given.

    Raises:
      UserError: a file is damaged, or results would replace others.
    """
    files = _joined({path: _read(path, args) for path in args.score})
    _check_apart(files)
    found: list[Result] = []
    for path, predictions in files.items():
        out = _result_folder(args, predictions, len(files))
        _check_out(out, (PREDICTIONS, SCORES, SUBMISSION), args.overwrite, path)
        if for_server(predictions):
            if out is None:
                raise UserError(
                    f"the right answers of {predictions[0].benchmark}'s test split are not public: "
                    f"give --out=DIR for its {SUBMISSION}, or score the dev split."
                )
            submit(predictions, out, _say)
            continue
        kept = [p for p in predictions if p.target or not args.allow_missing]
        if len(kept) < len(predictions):
            _say(f"{path}: {len(predictions) - len(kept)} left out, no target")
        found.append(score_predictions(kept))
    if args.out and found:
        _check_out(args.out, (RESULTS,), args.overwrite)
        scored = [predictions for predictions, _ in found]
        questions = _page_questions(args, scored)
        for predictions, scores in found:
            folder = _result_folder(args, predictions, len(files)) or args.out
            write_results(folder, predictions, scores)
        write_results_page(args.out / RESULTS, found, questions)
    print_scores([scores for _, scores in found], len(files) > 1, args.json)


def compare_files(args: argparse.Namespace) -> None:
    """Compares both of `args.compare`, and writes what changed into `args.out`, if given.

    Raises:
      UserError: they cannot be compared.
    """
    paths = [predictions_in(path) for path in args.compare]
    _check_out(args.out, (COMPARISON, COMPARED), args.overwrite)
    first, second = (_read(path, args) for path in paths)
    a, b = in_pairs(first, second, args.allow_missing)
    left_out = len(first) + len(second) - len(a) - len(b)
    if left_out:
        _say(f"answers left out, as only A or B has them: {left_out}")
    found, names = compare(a, b), (str(args.compare[0]), str(args.compare[1]))
    if args.out:
        questions = _page_questions(args, [a])
        write_comparison_page(args.out / COMPARISON, found, names, questions)
        write_atomic(args.out / COMPARED, json.dumps(found.as_json(), indent=1) + "\n")
    print(json.dumps(found.as_json()) if args.json else printable(as_text(found, names)))


def _read(path: Path, args: argparse.Namespace) -> list[Prediction]:
    """The predictions in a file, of this package or of another tool."""
    tool = tool_of(path)
    if tool is None:
        return read_predictions(path)
    answers = read_tool_answers(path, tool, args.benchmark)
    return tool_predictions(answers, args.data, args.allow_missing, args.allow_outside_paths, _say)


def _joined(files: Mapping[Path, list[Prediction]]) -> dict[Path, list[Prediction]]:
    """The files, with those of lmms-eval's tasks as one that are parts of one benchmark."""
    found: dict[Path, list[Prediction]] = {}
    first: dict[str, Path] = {}
    for path, predictions in files.items():
        name = predictions[0].benchmark
        if tool_of(path) == LMMS and name in first:
            before = found[first[name]]
            if {p.id for p in before}.isdisjoint(p.id for p in predictions):
                before += predictions
                continue
        elif tool_of(path) == LMMS:
            first[name] = path
        found[path] = predictions
    return found


def _page_questions(
    args: argparse.Namespace, answered: Sequence[Sequence[Prediction]]
) -> Questions:
    """The questions with the images of a page, which scores of other tools' answers do not need."""
    try:
        return questions_in(args.data, answered, args.allow_missing, args.allow_outside_paths)
    except UserError as reason:
        if not any(map(tool_of, args.score or args.compare)):
            raise
        _say(f"the page has no images: {reason}")
        return {}


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr)


def _result_folder(
    args: argparse.Namespace, predictions: Sequence[Prediction], files: int
) -> Path | None:
    """`args.out`, or for several files, whose results have the same names, a folder in it."""
    out: Path | None = args.out
    return out / predictions[0].benchmark if out and files > 1 else out


def _check_apart(files: Mapping[Path, Sequence[Prediction]]) -> None:
    """Raises `UserError` where two files are of one benchmark: their results share names."""
    names = [predictions[0].benchmark for predictions in files.values()]
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
    """Raises `UserError` where results would replace others, or the file that is scored."""
    if folder is None:
        return
    for name in names:
        path = folder / name
        if read is not None and path.exists() and path.resolve() == read.resolve():
            raise UserError(f"{path} is what is read: choose another folder for --out.")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists: choose another folder or give --overwrite.")
