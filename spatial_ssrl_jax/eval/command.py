"""What `evaluate` does to ask a model: opens questions and model, asks, scores."""

import argparse
from functools import cache, partial

import jax
from rich.console import Console

from spatial_ssrl_jax.checkpoint.models import ModelFolder, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.eval.benchmark_run import (
    open_set,
    prediction_logs,
    report_left_out,
    run_and_score,
)
from spatial_ssrl_jax.eval.benchmarks.registry import SETS, Benchmark
from spatial_ssrl_jax.eval.heldout import open_pretext
from spatial_ssrl_jax.eval.reports.results_page import RESULTS, Result, write_results_page
from spatial_ssrl_jax.eval.runner import EvalOptions
from spatial_ssrl_jax.eval.scoring.scores import Scores
from spatial_ssrl_jax.inference.policy import Policy
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.parallel import distributed
from spatial_ssrl_jax.parallel.collectives import is_primary
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.kernels import choose_decode_kernel
from spatial_ssrl_jax.rollout.engine import Engine


def evaluate_model(args: argparse.Namespace) -> list[Scores] | None:
    """Asks one benchmark or a set; each answer is kept as soon as it is there.

    Args:
      args: `evaluate`'s options, checked.

    Returns:
      The scores of what could be scored; None on processes that do not write.

    Raises:
      UserError: something is missing, or does not belong together.
    """
    distributed.connect(args, MeshSettings().heartbeat_timeout)
    with Progress(Console(stderr=True, quiet=not is_primary())) as progress:
        model, how = open_model(args.model), _how(args)
        benchmarks = _open(args, model, progress)
        about = {"model": args.model, "weights": model.fingerprint(), "dtype": _dtype(args)}
        if args.source is not None:
            about |= {"source": args.source, "heldout_fraction": args.heldout_fraction}
        kept = prediction_logs(
            benchmarks, args.out, about, how, args.overwrite, apart=args.benchmark in SETS
        )
        respondent = cache(partial(_respondent, model, args, progress))
        found: list[Result] = []
        for benchmark, journal in zip(benchmarks, kept, strict=True):
            result = run_and_score(
                benchmark, how, journal, respondent, progress, args.allow_missing
            )
            found += [result] if result else []
        if found:
            progress.doing(f"writing {args.out / RESULTS}")
            questions = {(b.name, q.id): q for b in benchmarks for q in b.questions}
            write_results_page(args.out / RESULTS, found, questions)
    return [scores for _, scores in found] if is_primary() else None


def _open(args: argparse.Namespace, model: ModelFolder, progress: Progress) -> list[Benchmark]:
    """The benchmarks that are asked for, before the model is loaded."""
    if args.source is None:
        return open_set(args.benchmark, args.data, args.allow_missing, progress.say)
    source = open_source(args.source)
    progress.doing(f"making questions of {args.source}")
    processor = Processor(model.files, model.config, args.min_pixels, args.max_pixels)
    share, seed = args.heldout_fraction, args.seed
    opened = open_pretext(source, processor, args.examples, share, seed)
    report_left_out(opened.left_out, opened.spec.title, progress.say)
    return [opened]


def _how(args: argparse.Namespace) -> EvalOptions:
    return EvalOptions(
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


def _respondent(model: ModelFolder, args: argparse.Namespace, progress: Progress) -> Policy:
    """Loads the model, every device with a part of each batch."""
    progress.doing("loading the model")
    if jax.device_count() % (args.fsdp * args.tensor):
        raise UserError(
            f"--fsdp={args.fsdp} and --tensor={args.tensor} do not divide the "
            f"{jax.device_count()} devices: change them."
        )
    layout = Layout(make_mesh(MeshSettings(data=-1, fsdp=args.fsdp, tensor=args.tensor)))
    dtype = _dtype(args)
    params = model.load(layout, dtype)
    stops = Processor(model.files, model.config).stop_ids
    step_kernel = choose_decode_kernel("auto", dtype, layout.mesh)
    compute = Compute(dtype, decode_attention=step_kernel)
    engine = Engine(model.config, compute, stops, shards=layout.batch_shards)
    return Policy(model.files, engine, layout, params, engine.fill(params))
