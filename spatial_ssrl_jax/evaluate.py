"""Benchmarks: python -m spatial_ssrl_jax.evaluate --model=DIR --benchmark=NAME --data=PATH"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from spatial_ssrl_jax.common.errors import UserError, run_command
from spatial_ssrl_jax.common.paths import write_atomic
from spatial_ssrl_jax.eval.benchmarks.pretext import PRETEXT
from spatial_ssrl_jax.eval.benchmarks.registry import SCORED, SETS
from spatial_ssrl_jax.eval.offline import compare_files, score_files
from spatial_ssrl_jax.eval.other_tools import tool_of
from spatial_ssrl_jax.eval.predictions import TABLE
from spatial_ssrl_jax.eval.reports.comparison_page import COMPARED
from spatial_ssrl_jax.eval.reports.text import print_scores
from spatial_ssrl_jax.eval.scoring.published import comparable, table_json

_DATA = (
    "its question file, or the folder of it; with --score or --compare, for images, and for the "
    "questions of other tools' answers"
)
_BENCHMARK = "{}; with --score or --compare, of another tool's file whose name does not say it"


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    if args.compare:
        compare_files(args)
    elif args.score:
        score_files(args)
    else:
        _evaluate(args)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.evaluate",
        description="Asks a model a benchmark's questions and scores its answers, or, without a "
        "model, scores or compares stored answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_results(parser)
    _add_model(parser)
    _add_scoring(parser)
    args = parser.parse_args(argv)
    _check(args)
    return args


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder of the results (of several, of folders)")
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="leave out what has no answer, image or video, and say how many",
    )
    parser.add_argument(
        "--allow-outside-paths",
        action="store_true",
        help="let paths in question files leave the folder of --data or --source",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results in --out")
    parser.add_argument(
        "--json",
        action="store_true",
        help=f'print scores.json; of several, {{"scores": […]}}; with --compare {COMPARED}',
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    from spatial_ssrl_jax.inference.options import add_inference_options
    from spatial_ssrl_jax.parallel.distributed import add_options

    group = parser.add_argument_group("with a model (the same command resumes after a stop)")
    group.add_argument("--model", help="folder, checkpoint or hub id")
    group.add_argument(
        "--benchmark", metavar="NAME", help=_BENCHMARK.format(", ".join([*SETS, *SCORED]))
    )
    group.add_argument("--data", type=Path, help=_DATA)
    group.add_argument("--source", metavar="SPEC", help="pretext: where its images come from")
    group.add_argument("--examples", type=int, default=64, help="pretext: questions a task")
    group.add_argument(
        "--heldout-fraction",
        type=float,
        default=0.05,
        help="pretext: of the images, as in the run",
    )
    group.add_argument(
        "--reasoning", action="store_true", help="with the format prompt and a boxed answer"
    )
    group.add_argument(
        "--own-prompt",
        action="store_true",
        help="with the benchmark's own reasoning prompt, where it has one",
    )
    group.add_argument(
        "--paper-prompts",
        action="store_true",
        help="as the paper's released code asks, its faults included (BUILD.md names them)",
    )
    group.add_argument("--max-frames", type=int, help="of a video: by the benchmark")
    add_inference_options(group, new_tokens=None, by="the benchmark")
    group.add_argument("--prompts", type=int, default=16, help="max in a batch on each shard")
    group.add_argument("--fsdp", type=int, default=1, help="devices that shard the weights")
    group.add_argument("--tensor", type=int, default=1, help="devices that shard each layer")
    add_options(parser)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("without a model: scoring or comparing stored answers")
    group.add_argument(
        "--score",
        type=Path,
        nargs="+",
        help="a predictions.jsonl, a table of VLMEvalKit (.xlsx, .tsv, .json) or samples of "
        "lmms-eval (.jsonl); of several benchmarks several, for one table",
    )
    group.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="two such files of one benchmark, or folders with predictions.jsonl: how B differs "
        "from A",
    )


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` where options contradict each other or a value is out of range."""
    if args.score and args.compare:
        raise UserError("--score and --compare exclude each other: leave one out.")
    if args.score or args.compare:
        what = "--score" if args.score else "--compare"
        others = any(map(tool_of, args.score or args.compare))
        unused = ("model", "source") if others else ("model", "benchmark", "source")
        given = [n for n in unused if getattr(args, n) is not None]
        if given:
            raise UserError(f"{what} needs no --{given[0]}: leave it out, or leave out {what}.")
        if args.data and not args.out and not others:
            raise UserError(f"with {what}, --data is for a page's images: give --out=DIR too.")
        return
    data, other = "data", "source"
    if args.benchmark == PRETEXT.name:
        data, other = other, data
    missing = [n for n in ("benchmark", "model", data, "out") if getattr(args, n) is None]
    if missing:
        raise UserError(
            f"--{missing[0]} is missing: give --model, --benchmark, --{data} and --out to ask a "
            "model, or --score=predictions.jsonl to score answers."
        )
    if getattr(args, other) is not None:
        raise UserError(f"{args.benchmark} takes --{data}: leave out --{other}.")
    if args.paper_prompts and args.benchmark == PRETEXT.name:
        raise UserError("the pretext tasks have one wording: leave out --paper-prompts.")
    if args.reasoning and args.own_prompt:
        raise UserError("--reasoning and --own-prompt are two prompts: leave one out.")
    from spatial_ssrl_jax.inference.options import check_inference_options

    args.sampling = check_inference_options(args)
    if args.samples > 1 and args.temperature == 0:
        raise UserError("--samples of a greedy answer are all the same: give a --temperature.")
    if args.max_frames is not None and args.max_frames < 2:
        raise UserError("--max-frames must be at least 2.")
    if min(args.prompts, args.fsdp, args.tensor, args.examples) < 1:
        raise UserError("--prompts, --fsdp, --tensor and --examples must be at least 1.")
    if not 0 < args.heldout_fraction < 1:
        raise UserError("--heldout-fraction must be above 0 and below 1.")


def _evaluate(args: argparse.Namespace) -> None:
    """Runs one benchmark or a set; each batch's answers are stored at once."""
    # Takes seconds to import; offline scoring needs none of it.
    from spatial_ssrl_jax.eval.evaluate_model import evaluate_model

    found = evaluate_model(args)
    if found is None:
        return
    several = args.benchmark in SETS
    if several:
        ours = {scores.benchmark: comparable(scores) for scores in found}
        write_atomic(args.out / TABLE, json.dumps(table_json(ours), indent=1) + "\n")
    print_scores(found, several, args.json)


if __name__ == "__main__":
    run_command(main)
