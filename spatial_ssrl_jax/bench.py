"""Times one part: python -m spatial_ssrl_jax.bench tasks|padding|flops|rollout|update|step

`bench verify-kernels` compares and times the attention kernels of the device at hand.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spatial_ssrl_jax.common.errors import UserError, run_command

# What `ArgumentParser.add_subparsers` returns.
Commands = argparse._SubParsersAction


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.bench", description="Times one part of the method."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_tasks(commands)
    _add_padding(commands)
    _add_flops(commands)
    _add_device_parts(commands)
    _add_verify_kernels(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object")
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.command not in ("padding", "flops"):
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    found = args.run(args)
    print(json.dumps(found) if args.json else "\n".join(args.lines(found)))


def _lines(found: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """A line a metric, nested names joined by dots."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _lines(value, f"{prefix}{name}.")
        else:
            shown = f"{value:,.4g}" if isinstance(value, float) else value
            yield f"{prefix}{name:<24} {shown}"


def _add_tasks(commands: Commands) -> None:
    parser = commands.add_parser(
        "tasks",
        help="milliseconds an image of each task, and images a second of the whole pipeline",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--source", help="images; default built-in scenes")
    parser.add_argument("--repeats", type=int, default=30, help="examples a task that are timed")
    parser.add_argument("--model", default="tiny", help="folder whose processor makes prompts")
    parser.add_argument("--batch", type=int, default=16, help="prompts a batch of the pipeline")
    parser.add_argument("--batches", type=int, default=4, help="batches that are timed; 0 for none")
    parser.add_argument("--threads", type=int, default=8, help="as data.threads")
    parser.add_argument("--workers", type=int, default=0, help="as data.workers")
    parser.add_argument(
        "--step-seconds", type=float, default=0.0, help="length of the step that waits for batches"
    )
    parser.set_defaults(run=_tasks, lines=_lines)


def _tasks(args: argparse.Namespace) -> dict[str, Any]:
    from spatial_ssrl_jax.benchmarking.pipeline import time_pipeline, time_tasks

    report: dict[str, Any] = {"tasks": time_tasks(args.source, args.repeats)}
    if args.batches:
        report["pipeline"] = time_pipeline(
            args.source or "scenes:1000:640x480",
            args.model,
            batch=args.batch,
            batches=args.batches,
            threads=args.threads,
            workers=args.workers,
            step_seconds=args.step_seconds,
        )
    return report


def _add_padding(commands: Commands) -> None:
    parser = commands.add_parser(
        "padding",
        help="what an update computes for padding under a config, from sizes alone",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a config file; --config.a.b=v overrides")
    parser.add_argument(
        "--model", help="folder whose processor makes prompts; default the config's"
    )
    parser.add_argument("--source", help="images; default the config's, or scenes of their sizes")
    parser.add_argument("--steps", type=int, default=200, help="GRPO steps")
    parser.add_argument("--mean", type=float, default=200.0, help="mean tokens of a drawn response")
    parser.add_argument("--spread", type=float, default=0.3, help="sigma of their logarithm")
    parser.add_argument("--correlation", type=float, default=0.4, help="of two in a group")
    parser.set_defaults(run=_padding, lines=_lines)


def _padding(args: argparse.Namespace) -> dict[str, Any]:
    from spatial_ssrl_jax.benchmarking.padding import measure_padding
    from spatial_ssrl_jax.checkpoint.models import open_model
    from spatial_ssrl_jax.config.load import load_config, split_overrides
    from spatial_ssrl_jax.data.lengths import Lengths
    from spatial_ssrl_jax.data.processor import ImageArea, Processor
    from spatial_ssrl_jax.perf.response_lengths import LogNormalLengths

    rest, overrides = split_overrides(args.rest)
    if rest:
        raise UserError(f"{rest[0]} is no option of bench padding: see --help.")
    config = load_config(args.config, overrides)
    model, limits = open_model(args.model or config.model.path), config.data
    area = ImageArea(limits.min_pixels, limits.max_pixels)
    processor = Processor(model.files, model.config, area=area)
    lengths = Lengths.open(config, processor, args.source)
    drawn = LogNormalLengths(
        args.mean, args.spread, config.rollout.max_new_tokens, args.correlation
    )
    return measure_padding(config, model.config, lengths, args.steps, drawn)


def _add_flops(commands: Commands) -> None:
    parser = commands.add_parser(
        "flops",
        help="FLOPs of a GRPO step that shares a group's prompt, and of one that repeats it, at "
        "the five tasks' prompt sizes; computed, not measured",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a config file; --config.a.b=v overrides")
    parser.add_argument(
        "--model", help="folder, checkpoint or hub id, without weights; the config's"
    )
    parser.add_argument("--processor", help="folder with tokenizer files; default the model's")
    parser.add_argument("--group", type=int, default=5, help="samples a prompt")
    parser.set_defaults(run=_flops, lines=_flops_lines)


def _flops(args: argparse.Namespace) -> dict[str, Any]:
    from spatial_ssrl_jax.benchmarking.prompt_sharing import sharing_report
    from spatial_ssrl_jax.checkpoint.models import open_model
    from spatial_ssrl_jax.config.load import load_config, split_overrides
    from spatial_ssrl_jax.data.processor import ImageArea, Processor

    rest, overrides = split_overrides(args.rest)
    if rest:
        raise UserError(f"{rest[0]} is no option of bench flops: see --help.")
    config = load_config(args.config, overrides)
    model, limits = open_model(args.model or config.model.path), config.data
    files = Path(args.processor) if args.processor else model.files
    area = ImageArea(limits.min_pixels, limits.max_pixels)
    processor = Processor(files, model.config, area=area)
    return sharing_report(model.config, config, processor, args.group)


def _flops_lines(found: dict[str, Any]) -> Sequence[str]:
    from spatial_ssrl_jax.benchmarking.prompt_sharing import sharing_lines

    return sharing_lines(found)


def _add_device_parts(commands: Commands) -> None:
    """The parts that run on devices; they import neither Grain nor TFDS."""
    from spatial_ssrl_jax.benchmarking.rollout_timing import add_rollout_options, bench_rollout
    from spatial_ssrl_jax.benchmarking.training_timing import bench_step, bench_update
    from spatial_ssrl_jax.benchmarking.workload import add_options, within_memory

    for name, run, text in (
        ("rollout", bench_rollout, "sampling alone; every sample runs to --new tokens"),
        ("update", bench_update, "one optimizer step without KL"),
        ("step", bench_step, "rollout, reference log-probabilities and update"),
    ):
        parser = commands.add_parser(
            name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add_options(parser)
        if name == "rollout":
            add_rollout_options(parser)
        parser.set_defaults(run=within_memory(run), lines=_lines)


def _add_verify_kernels(commands: Commands) -> None:
    parser = commands.add_parser(
        "verify-kernels",
        help="which attention is right and fastest on this device: what `auto` should be; two "
        "layers at the 3B's widths",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=5, help="timed runs after one that compiles")
    parser.set_defaults(run=_verify_kernels, lines=_kernel_lines)


def _verify_kernels(args: argparse.Namespace) -> dict[str, Any]:
    from spatial_ssrl_jax.benchmarking.kernel_check import verify_kernels

    if args.runs < 1:
        raise UserError(f"--runs={args.runs} must be at least 1.")
    return verify_kernels(args.runs)


def _kernel_lines(found: dict[str, Any]) -> Sequence[str]:
    from spatial_ssrl_jax.benchmarking.kernel_check import kernel_lines

    return kernel_lines(found)


if __name__ == "__main__":
    run_command(main)
