"""Benchmarks: python -m spatial_ssrl_jax.evaluate --model=DIR --benchmark=NAME --data=PATH"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from spatial_ssrl_jax.errors import UserError, run_command
from spatial_ssrl_jax.eval.benchmarks import SCORED, SETS, for_server, score_records
from spatial_ssrl_jax.eval.paper import VARIANT, comparable, published, table, table_json
from spatial_ssrl_jax.eval.predictions import (
    PREDICTIONS,
    SCORES,
    SUBMISSION,
    TABLE,
    read_predictions,
    submit,
    write_results,
    write_whole,
)
from spatial_ssrl_jax.eval.pretext_tasks import CHANCE, PRETEXT
from spatial_ssrl_jax.eval.scores import Scores
from spatial_ssrl_jax.rollout import options
from spatial_ssrl_jax.run import distributed


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    if args.score:
        _score(args)
    else:
        _ask(args)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.evaluate",
        description="Asks a model a benchmark's questions and scores its answers, or, without a "
        "model, answers that are there already.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_results(parser)
    _add_asking(parser)
    _add_scoring(parser)
    args = parser.parse_args(argv)
    _check(args)
    return args


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder of the results (of several, of folders)")
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="leave out what has no answer, picture or video, and say how many",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results in --out")
    parser.add_argument(
        "--json", action="store_true", help='print scores.json; of several, {"scores": […]}'
    )


def _add_asking(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("asking a model (the same command goes on after a stop)")
    group.add_argument("--model", help="folder, checkpoint or hub id")
    group.add_argument("--benchmark", metavar="NAME", help=", ".join([*SETS, *SCORED]))
    group.add_argument("--data", type=Path, help="its question file, or a folder that holds it")
    group.add_argument("--source", metavar="SPEC", help="pretext: where its pictures come from")
    group.add_argument("--examples", type=int, default=64, help="pretext: questions a task")
    group.add_argument(
        "--heldout-share", type=float, default=0.05, help="pretext: of the pictures, as in the run"
    )
    group.add_argument(
        "--reasoning", action="store_true", help="with the format prompt and a boxed answer"
    )
    group.add_argument(
        "--own-prompt",
        action="store_true",
        help="with the benchmark's own reasoning prompt, where it has one",
    )
    group.add_argument("--max-frames", type=int, help="of a video: by the benchmark")
    options.add_options(group, new_tokens=None, by="the benchmark")
    group.add_argument("--prompts", type=int, default=16, help="at a time on each device, at most")
    group.add_argument("--fsdp", type=int, default=1, help="devices that share the weights")
    group.add_argument("--tensor", type=int, default=1, help="devices that share each layer")
    distributed.add_options(parser)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scoring what was answered")
    group.add_argument(
        "--score",
        type=Path,
        nargs="+",
        help="a predictions.jsonl; of several benchmarks several, for one table",
    )


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` where options do not belong together or make no sense."""
    if args.score:
        asking = ("model", "benchmark", "data", "source")
        given = [n for n in asking if getattr(args, n) is not None]
        if given:
            raise UserError(f"--score needs no --{given[0]}: leave it out, or leave out --score.")
        return
    place, other = "data", "source"
    if args.benchmark == PRETEXT.name:
        place, other = other, place
    missing = [n for n in ("benchmark", "model", place, "out") if getattr(args, n) is None]
    if missing:
        raise UserError(
            f"--{missing[0]} is missing: give --model, --benchmark, --{place} and --out to ask a "
            "model, or --score=predictions.jsonl to score answers."
        )
    if getattr(args, other) is not None:
        raise UserError(f"{args.benchmark} takes --{place}: leave out --{other}.")
    if args.reasoning and args.own_prompt:
        raise UserError("--reasoning and --own-prompt are two prompts: leave one out.")
    args.sampling = options.check_options(args)
    if args.samples > 1 and args.temperature == 0:
        raise UserError("--samples of a greedy answer are all the same: give a --temperature.")
    if args.max_frames is not None and args.max_frames < 2:
        raise UserError("--max-frames must be at least 2.")
    if min(args.prompts, args.fsdp, args.tensor, args.examples) < 1:
        raise UserError("--prompts, --fsdp, --tensor and --examples must be at least 1.")
    if not 0 < args.heldout_share < 1:
        raise UserError("--heldout-share must be above 0 and below 1.")


def _ask(args: argparse.Namespace) -> None:
    """Asks one benchmark or a set; each answer is kept as soon as it is there."""
    # Scoring alone needs none of what this takes seconds to import.
    from spatial_ssrl_jax.eval.command import ask_and_score

    found = ask_and_score(args)
    if found is None:
        return
    several = args.benchmark in SETS
    if several:
        figures = {scores.benchmark: comparable(scores) for scores in found}
        write_whole(args.out / TABLE, json.dumps(table_json(figures), indent=1) + "\n")
    _print(found, several, args.json)


def _score(args: argparse.Namespace) -> None:
    """Scores files of answers, without a model."""
    files = {path: read_predictions(path) for path in args.score}
    found = []
    for path, records in files.items():
        # Several benchmarks would leave files of one name: each has a folder of its own.
        out = args.out / records[0].benchmark if args.out and len(files) > 1 else args.out
        _check_out(out, args.overwrite, path)
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
        scored, scores = score_records(kept)
        if out:
            write_results(out, scored, scores)
        found.append(scores)
    _print(found, len(files) > 1, args.json)


def _check_out(folder: Path | None, overwrite: bool, read: Path) -> None:
    """Raises `UserError` where results would replace others, or what they are made from."""
    for name in (PREDICTIONS, SCORES, SUBMISSION) if folder else ():
        path = folder / name
        if path.exists() and path.resolve() == read.resolve():
            raise UserError(f"{path} is what is read: choose another folder for --out.")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists: choose another folder or give --overwrite.")


def _print(found: Sequence[Scores], several: bool, as_json: bool) -> None:
    if as_json:
        whole = [scores.as_json() for scores in found]
        print(json.dumps({"scores": whole} if several or not whole else whole[0]))
    elif not several:
        print("\n".join(map(_report, found)), end="\n" if found else "")
    elif found:
        titles = {name: spec.title for name, spec in SCORED.items()}
        ours = {scores.benchmark: comparable(scores) for scores in found}
        print("\n".join([*map(_headline, found), "", table(ours, titles)]))


def _headline(scores: Scores) -> str:
    low, high = scores.ci95
    return (
        f"{SCORED[scores.benchmark].title}: {scores.score:.2f} [{low:.2f}, {high:.2f}], "
        f"{scores.count} questions, {scores.unparsed} without an answer that can be read (wrong)"
    )


def _report(scores: Scores) -> str:
    """The score with its interval, its categories, and the paper's figures."""
    lines = [_headline(scores)]
    lines += [
        f"  {name}: {value:.2f}"
        for name, value in scores.extra.items()
        if not name.startswith(CHANCE)
    ]
    width = max(map(len, scores.categories))
    lines += [
        f"  {name:{width}}  {found['score']:6.2f}  of {found['count']}{_chance(scores, name)}"
        for name, found in scores.categories.items()
    ]
    rows = published(scores.benchmark)
    if rows:
        variant = VARIANT.get(scores.benchmark)
        lines.append(f"the paper{f' (compare {variant!r} above)' if variant else ''}:")
        lines += [f"  {model}: {value:.2f}" for model, value in rows.items()]
    return "\n".join(lines)


def _chance(scores: Scores, category: str) -> str:
    """What guessing gives in a category, where that is known."""
    chance = scores.extra.get(CHANCE + category)
    return "" if chance is None else f"  (chance {chance:.2f})"


if __name__ == "__main__":
    run_command(main)
