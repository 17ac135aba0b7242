"""Wall time of a run, and its rates as fractions of the device's peak."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from spatial_ssrl_jax.perf.device_specs import device_spec


def median_seconds(run: Callable[[], Any], runs: int) -> float:
    """Median seconds of `runs` runs after one that compiles."""
    run()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def timing_report(
    args: argparse.Namespace,
    flops: float,
    traffic: float,
    seconds: float,
    metrics: Mapping[str, float | None],
    run: Callable[[], Any],
) -> dict[str, Any]:
    """A timing with its sizes, its device, and its fractions of the device's peak rates.

    With `--profile` a trace of one more run is written.

    Args:
      args: the command line.
      flops: useful FLOPs (`perf/flops.py`): matmuls without padding and recomputation.
      traffic: useful bytes (`perf/memory_traffic.py`): weights, caches, gradients, optimizer state.
      seconds: median of the timed runs.
      metrics: further ones, which come first.
      run: what was timed; returns when the devices are done.

    Returns:
      Fractions are of all devices together, and None where the device's peak rates are not known.
    """
    spec, devices = device_spec(), jax.device_count()
    if args.profile:
        with jax.profiler.trace(args.profile):
            run()
    return {
        **metrics,
        "seconds": seconds,
        "useful_flops": flops,
        "flops_per_second": flops / seconds,
        "share_of_peak": flops / seconds / (spec.flops * devices) if spec else None,
        "useful_bytes": traffic,
        "bytes_per_second": traffic / seconds,
        "share_of_bandwidth": traffic / seconds / (spec.bandwidth * devices) if spec else None,
        "device": jax.devices()[0].device_kind,
        "prompts": args.prompts,
        "group": args.group,
        "new": args.new,
        "prompt_tokens": args.prompt_tokens,
        "runs": args.runs,
    }
