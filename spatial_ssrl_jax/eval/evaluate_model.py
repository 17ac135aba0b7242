"""`evaluate` with a model: opens questions and model, runs the benchmarks, writes the page."""

import argparse
from contextlib import ExitStack, suppress
from functools import cache, partial
from pathlib import Path

import jax
from rich.console import Console

from spatial_ssrl_jax.checkpoint.models import ModelFolder, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.lock import locked
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources import Reading, open_source
from spatial_ssrl_jax.eval.benchmarks.registry import SETS, Benchmark
from spatial_ssrl_jax.eval.evaluation import (
    open_set,
    prediction_logs,
    report_left_out,
    run_and_score,
)
from spatial_ssrl_jax.eval.heldout_items import open_pretext
from spatial_ssrl_jax.eval.options import EvalOptions
from spatial_ssrl_jax.eval.reports.results_page import RESULTS, Result, write_results_page
from spatial_ssrl_jax.eval.scoring.scores import Scores
from spatial_ssrl_jax.inference.options import default_dtype
from spatial_ssrl_jax.inference.policy import Policy
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.parallel import distributed
from spatial_ssrl_jax.parallel.collectives import is_primary


def evaluate_model(args: argparse.Namespace) -> list[Scores] | None:
    """Runs one benchmark or a set; each batch's answers are stored at once.

    Args:
      args: `evaluate`'s options, checked.

    Returns:
      The scores of each benchmark with public answers; None on processes that do not write.

    Raises:
      UserError: a file or model is missing, or options contradict each other.
    """
    distributed.connect(args, MeshSettings().heartbeat_timeout)
    quiet = not is_primary()
    with Progress(Console(stderr=True, quiet=quiet)) as progress, ExitStack() as resources:
        model, options = open_model(args.model), _options(args)
        benchmarks = _open(args, model, progress)
        about = {
            "model": args.model,
            "weights": model.fingerprint(),
            "dtype": default_dtype(args.dtype),
        }
        if args.source is not None:
            about |= {"source": args.source, "heldout_fraction": args.heldout_fraction}
        if args.paper_prompts:
            about |= {"paper_prompts": True}
        if is_primary():
            if not args.out.exists():
                args.out.mkdir(parents=True)
                resources.callback(_remove_if_empty, args.out)
            resources.enter_context(locked(args.out, progress.say))
        logs = prediction_logs(
            benchmarks, args.out, about, options, args.overwrite, apart=args.benchmark in SETS
        )
        open_policy = cache(partial(_open_policy, model, args, progress))
        found: list[Result] = []
        for benchmark, log in zip(benchmarks, logs, strict=True):
            result = run_and_score(
                benchmark, options, log, open_policy, progress, args.allow_missing
            )
            found += [result] if result else []
        if found:
            progress.doing(f"writing {args.out / RESULTS}")
            questions = {(b.name, q.id): q for b in benchmarks for q in b.questions}
            write_results_page(args.out / RESULTS, found, questions)
    return [scores for _, scores in found] if is_primary() else None


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _open(args: argparse.Namespace, model: ModelFolder, progress: Progress) -> list[Benchmark]:
    """The benchmarks, opened before the model is loaded."""
    if args.source is None:
        return open_set(
            args.benchmark,
            args.data,
            args.allow_missing,
            args.allow_outside_paths,
            args.paper_prompts,
            progress.say,
        )
    reading = Reading(allow_outside_paths=args.allow_outside_paths)
    source = open_source(args.source, reading)
    progress.doing(f"making questions of {args.source}")
    processor = Processor(model.files, model.config, args.min_pixels, args.max_pixels)
    opened = open_pretext(source, processor, args.examples, args.heldout_fraction, args.seed)
    report_left_out(opened.left_out, opened.spec.title, progress.say)
    return [opened]


def _options(args: argparse.Namespace) -> EvalOptions:
    return EvalOptions(
        style="reasoning" if args.reasoning else "own" if args.own_prompt else "direct",
        sampling=args.sampling,
        samples=args.samples,
        seed=args.seed,
        batch_prompts=args.prompts,
        new_tokens=args.max_new_tokens,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        frames=args.max_frames,
    )


def _open_policy(model: ModelFolder, args: argparse.Namespace, progress: Progress) -> Policy:
    """Loads the model, with batches sharded over all devices."""
    progress.doing("loading the model")
    if jax.device_count() % (args.fsdp * args.tensor):
        raise UserError(
            f"--fsdp={args.fsdp} and --tensor={args.tensor} do not divide the "
            f"{jax.device_count()} devices: change them."
        )
    mesh = MeshSettings(data=-1, fsdp=args.fsdp, tensor=args.tensor)
    return Policy.open(model, dtype=args.dtype, mesh=mesh)
