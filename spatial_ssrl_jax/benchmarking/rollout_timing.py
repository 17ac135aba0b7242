"""Timing of a rollout and of its decode steps on synthetic prompts."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from spatial_ssrl_jax.benchmarking.matmuls import replay, rollout_matmuls
from spatial_ssrl_jax.benchmarking.timing import median_seconds, timing_report
from spatial_ssrl_jax.benchmarking.workload import Workload, token_rates
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.perf.device_specs import device_spec
from spatial_ssrl_jax.perf.flops import decode_flops
from spatial_ssrl_jax.perf.memory_traffic import decode_bytes, rollout_bytes
from spatial_ssrl_jax.qwen_vl.layers import cast
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.rollout.cache import DecodeState
from spatial_ssrl_jax.rollout.decode import decode_chunk, initial_samples, prefill
from spatial_ssrl_jax.rollout.engine import Rollout
from spatial_ssrl_jax.rollout.sampling import Sampling, sample_keys


def add_rollout_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only a rollout's timing has."""
    parser.add_argument(
        "--matmuls",
        action="store_true",
        help="also time the rollout's matmuls alone, and the fraction of that rate reached",
    )


def bench_rollout(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling alone: all sampled tokens over the time of the whole call.

    Metrics that begin with `decode_`, and `--profile`, are of the decode steps alone; with
    `--lengths` there are none, and the profile is of the whole. With
    `--matmuls`, `matmul_seconds` is the time of the rollout's own matmuls by themselves,
    and `share_of_matmul_bound` the fraction of that rate that the rollout reaches.
    """
    workload, master = Workload.open(args)
    if args.matmuls and workload.compute.decode_attention.name != "xla":
        raise UserError("--matmuls counts XLA's matmuls alone: set --step-attention=xla with it.")
    params = cast(master, workload.compute.dtype)
    del master
    rollouts: list[Rollout] = []

    def sample() -> None:
        rollouts[:] = [workload.sample(params)]

    whole = median_seconds(sample, args.runs)
    metrics: dict[str, float | None] = {"rollout_tok_s": float(workload.length.sum()) / whole}
    metrics |= token_rates(workload, whole) | rollouts[0].use.metrics()
    if args.matmuls:
        bound = _matmul_seconds(workload, params)
        metrics |= {"matmul_seconds": bound, "share_of_matmul_bound": bound / whole}
    profiled = sample
    if args.lengths is None:
        profiled = _decode_program(workload, params)
        metrics |= _decode_metrics(workload, profiled)
    config, dtype = workload.config, workload.compute.dtype
    traffic = rollout_bytes(config, dtype, workload.shape.prompt, workload.length)
    return timing_report(args, workload.passes(1), traffic, whole, metrics, profiled)


def _decode_program(workload: Workload, params: Params) -> Callable[[], DecodeState]:
    """All decode steps of a rollout without its prefill, which runs here once."""
    args, config, engine = workload.args, workload.config, workload.engine
    weights = engine.fill(params)
    hidden, prefix = prefill(config, workload.compute, params, workload.prompts)
    keys = sample_keys(jax.random.key(0), jnp.asarray(workload.prompt_index), args.group)
    settings = engine.settings(Sampling())
    states = [initial_samples(config.text, args.group, args.new, args.new, hidden)]

    def decode() -> DecodeState:
        # The last run's state is donated, so that its caches exist once.
        state = replace(states.pop(), cursor=jnp.zeros((), jnp.int32))
        state = decode_chunk(config, settings, args.new, weights, prefix, state, keys)
        states.append(jax.block_until_ready(state))
        return state

    return decode


def _decode_metrics(workload: Workload, decode: Callable[[], Any]) -> dict[str, float | None]:
    """Rate of the decode steps alone, and its fraction of their roofline.

    `decode_roofline_seconds` is the larger of a step's useful bytes over the memory's bandwidth and
    its useful FLOPs over the peak FLOP/s, both of the datasheet.
    """
    args, config, shape = workload.args, workload.config, workload.shape
    spec, devices = device_spec(), jax.device_count()
    seconds = median_seconds(decode, args.runs) / args.new
    traffic = decode_bytes(config, workload.compute.dtype, shape.prompt, workload.length) / args.new
    flops = args.prompts * decode_flops(config, shape) / args.new
    bound = max(traffic / spec.bandwidth, flops / spec.flops) / devices if spec else None
    return {
        "decode_tok_s": args.prompts * args.group / seconds,
        "decode_step_seconds": seconds,
        "decode_bytes_per_step": traffic,
        "decode_flops_per_step": flops,
        "decode_roofline_seconds": bound,
        "decode_share_of_roofline": bound / seconds if bound else None,
    }


def _matmul_seconds(workload: Workload, params: Params) -> float:
    """Median seconds of the matmuls of prefill and decode alone, as one program."""
    args = workload.args
    once, looped = rollout_matmuls(
        workload.config, workload.compute, params, workload.prompts, args.group, args.new
    )
    program, operands = replay(once, looped, trip_count=args.new)
    return median_seconds(lambda: jax.block_until_ready(program(operands)), args.runs)
