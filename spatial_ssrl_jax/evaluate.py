"""Benchmarks: python -m spatial_ssrl_jax.evaluate --model=DIR --benchmark=NAME --data=PATH"""

import argparse
import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import jax
from rich.console import Console

from spatial_ssrl_jax.config import MeshSettings
from spatial_ssrl_jax.data.prompts import Processor
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.errors import UserError, run_command
from spatial_ssrl_jax.eval.answered import compare_files, score_files
from spatial_ssrl_jax.eval.asking import How, Respondent
from spatial_ssrl_jax.eval.benchmarks import SCORED, SETS, Benchmark
from spatial_ssrl_jax.eval.compare_report import COMPARED
from spatial_ssrl_jax.eval.paper import comparable, table_json
from spatial_ssrl_jax.eval.predictions import TABLE, write_whole
from spatial_ssrl_jax.eval.pretext import open_pretext
from spatial_ssrl_jax.eval.pretext_tasks import PRETEXT
from spatial_ssrl_jax.eval.printing import print_scores
from spatial_ssrl_jax.eval.results_page import RESULTS, Result, write_results_page
from spatial_ssrl_jax.eval.runs import journals, open_set, run, tell_left_out
from spatial_ssrl_jax.qwen2_5_vl.model import Compute
from spatial_ssrl_jax.rollout import options
from spatial_ssrl_jax.rollout.engine import Engine
from spatial_ssrl_jax.run import distributed
from spatial_ssrl_jax.run.mesh import Layout, is_writer, make_mesh
from spatial_ssrl_jax.run.models import ModelFolder, open_model
from spatial_ssrl_jax.run.progress import Progress

_DATA = "its question file, or a folder that holds it; with answers that are there, for pictures"


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    if args.compare:
        compare_files(args)
    elif args.score:
        score_files(args)
    else:
        _ask(args)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.evaluate",
        description="Asks a model a benchmark's questions and scores its answers, or, without a "
        "model, scores or compares answers that are there already.",
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
        "--json",
        action="store_true",
        help=f'print scores.json; of several, {{"scores": […]}}; with --compare {COMPARED}',
    )


def _add_asking(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("asking a model (the same command goes on after a stop)")
    group.add_argument("--model", help="folder, checkpoint or hub id")
    group.add_argument("--benchmark", metavar="NAME", help=", ".join([*SETS, *SCORED]))
    group.add_argument("--data", type=Path, help=_DATA)
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
    options.add_options(group, new_tokens=None)
    group.add_argument("--prompts", type=int, default=16, help="at a time on each device, at most")
    group.add_argument("--fsdp", type=int, default=1, help="devices that share the weights")
    group.add_argument("--tensor", type=int, default=1, help="devices that share each layer")
    distributed.add_options(parser)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scoring or comparing what was answered")
    group.add_argument(
        "--score",
        type=Path,
        nargs="+",
        help="a predictions.jsonl; of several benchmarks several, for one table",
    )
    group.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="two predictions.jsonl of one benchmark, or their folders: how B differs from A",
    )


def _check(args: argparse.Namespace) -> None:
    """Raises `UserError` where options do not belong together or make no sense."""
    if args.score and args.compare:
        raise UserError("--score and --compare are two things: leave one out.")
    if args.score or args.compare:
        what = "--score" if args.score else "--compare"
        given = [n for n in ("model", "benchmark", "source") if getattr(args, n) is not None]
        if given:
            raise UserError(f"{what} needs no --{given[0]}: leave it out, or leave out {what}.")
        if args.data and not args.out:
            raise UserError(f"with {what}, --data is for a page's pictures: give --out=DIR too.")
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
    distributed.connect(args)
    with Progress(Console(stderr=True, quiet=not is_writer())) as progress:
        model, how = open_model(args.model), _how(args)
        benchmarks = _open(args, model, progress)
        about = {"model": args.model, "weights": model.fingerprint(), "dtype": _dtype(args)}
        if args.source is not None:
            about |= {"source": args.source, "heldout_share": args.heldout_share}
        several = args.benchmark in SETS
        kept = journals(benchmarks, args.out, about, how, args.overwrite, several)
        respondent = cache(partial(_respondent, model, args, progress))
        found: list[Result] = []
        for benchmark, journal in zip(benchmarks, kept, strict=True):
            result = run(benchmark, how, journal, respondent, progress, args.allow_missing)
            found += [result] if result else []
        if is_writer() and found:
            progress.doing(f"writing {args.out / RESULTS}")
            questions = {(b.name, q.id): q for b in benchmarks for q in b.questions}
            write_results_page(args.out / RESULTS, found, questions)
    if is_writer():
        scores = [scores for _, scores in found]
        if several:
            figures = {each.benchmark: comparable(each) for each in scores}
            write_whole(args.out / TABLE, json.dumps(table_json(figures), indent=1) + "\n")
        print_scores(scores, several, args.json)


def _open(args: argparse.Namespace, model: ModelFolder, progress: Progress) -> list[Benchmark]:
    """The benchmarks that are asked for, before the model is loaded."""
    if args.source is None:
        return open_set(args.benchmark, args.data, args.allow_missing, progress.say)
    source = open_source(args.source)
    progress.doing(f"making questions of {args.source}")
    processor = Processor(model.files, model.config, args.min_pixels, args.max_pixels)
    share, seed = args.heldout_share, args.seed
    opened = open_pretext(source, processor, args.examples, share, seed)
    tell_left_out(opened.left_out, opened.spec.title, progress.say)
    return [opened]


def _how(args: argparse.Namespace) -> How:
    return How(
        style="reasoning" if args.reasoning else "own" if args.own_prompt else "direct",
        sampling=args.sampling,
        samples=args.samples,
        seed=args.seed,
        prompts=args.prompts,
        new_tokens=args.max_new_tokens,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        frames=args.max_frames,
    )


def _dtype(args: argparse.Namespace) -> str:
    return args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def _respondent(model: ModelFolder, args: argparse.Namespace, progress: Progress) -> Respondent:
    """Loads the model, every device with a part of each batch."""
    progress.doing("loading the model")
    if jax.device_count() % (args.fsdp * args.tensor):
        raise UserError(
            f"--fsdp={args.fsdp} and --tensor={args.tensor} do not divide the "
            f"{jax.device_count()} devices: change them."
        )
    layout = Layout(make_mesh(MeshSettings(data=-1, fsdp=args.fsdp, tensor=args.tensor)))
    params = model.load(layout, _dtype(args))
    stops = Processor(model.files, model.config).stop_ids
    compute = Compute(_dtype(args))
    engine = Engine(model.config, compute, stops, shards=layout.batch_shards)
    return Respondent(model.files, engine, layout, params, engine.fill(params))


if __name__ == "__main__":
    run_command(main)
