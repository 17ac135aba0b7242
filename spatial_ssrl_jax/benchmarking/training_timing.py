"""Timing of a GRPO update, and of a whole GRPO step, on synthetic prompts."""

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from spatial_ssrl_jax.benchmarking.timing import median_seconds, timing_report
from spatial_ssrl_jax.benchmarking.workload import Workload, token_rates
from spatial_ssrl_jax.config.schema import GrpoSettings, OptimSettings
from spatial_ssrl_jax.perf.memory_traffic import rollout_bytes, update_bytes, weight_bytes
from spatial_ssrl_jax.qwen_vl.layers import cast
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.rl.batch import GroupBatch
from spatial_ssrl_jax.rl.logprobs import logprobs_of
from spatial_ssrl_jax.rl.losses import GrpoLoss
from spatial_ssrl_jax.rl.optimizer import make_optimizer
from spatial_ssrl_jax.rl.train_step import TrainState, initial_train_state, train_step
from spatial_ssrl_jax.rollout.engine import Rollout


def bench_update(args: argparse.Namespace) -> dict[str, Any]:
    """One optimizer step over groups of random tokens, without KL."""
    trainer = _Trainer.open(args, kl_coef=0.0)
    workload = trainer.workload
    run = partial(trainer.update, workload.groups(_random_rollout(workload)))
    seconds = median_seconds(run, args.runs)
    flops = workload.passes(3)
    traffic = update_bytes(workload.config, workload.compute.dtype)
    return timing_report(args, flops, traffic, seconds, {"step_seconds": seconds}, run)


def bench_step(args: argparse.Namespace) -> dict[str, Any]:
    """One whole GRPO step: rollout, reference log-probabilities, update.

    `mismatch_max` and `mismatch_mean` are between the sampler's and the trainer's log-probabilities
    of the sampled tokens, in nats, before vision tokens are suppressed, in the last step.
    """
    trainer = _Trainer.open(args, kl_coef=0.01)
    workload = trainer.workload
    laps: list[dict[str, float]] = []
    metrics: dict[str, Array] = {}

    def step() -> None:
        start = time.perf_counter()
        rollout = workload.sample(trainer.state.params)
        sampled = time.perf_counter()
        batches = trainer.with_reference(workload.groups(rollout))
        compared = time.perf_counter()
        metrics.update(trainer.update(batches))
        laps.append(
            {
                "rollout_seconds": sampled - start,
                "reference_seconds": compared - sampled,
                "update_seconds": time.perf_counter() - compared,
            }
        )

    seconds = median_seconds(step, args.runs)
    phases = {name: statistics.median(lap[name] for lap in laps[1:]) for name in laps[0]}
    mismatch = {f"mismatch_{k}": float(metrics[f"mismatch/logprob_{k}"]) for k in ("max", "mean")}
    config, dtype = workload.config, workload.compute.dtype
    flops = workload.passes(5)
    traffic = rollout_bytes(config, dtype, workload.shape.prompt, workload.length)
    traffic += weight_bytes(config, dtype) + update_bytes(config, dtype)
    found = {"step_seconds": seconds, **token_rates(workload, seconds), **phases, **mismatch}
    return timing_report(args, flops, traffic, seconds, found, step)


@dataclass
class _Trainer:
    """The state that updates continue from, and the KL's reference."""

    workload: Workload
    loss: GrpoLoss
    optimizer: optax.GradientTransformation
    state: TrainState[Array]
    reference: Params | None

    @classmethod
    def open(cls, args: argparse.Namespace, kl_coef: float) -> "_Trainer":
        workload, params = Workload.open(args)
        compute = workload.compute
        settings = GrpoSettings(kl_coef=kl_coef, minibatches_per_rollout=1)
        optimizer = make_optimizer(OptimSettings(), settings, 1)
        reference = None
        if kl_coef:
            copy = jax.jit(lambda p: cast(jax.tree.map(lambda x: x + 0, p), compute.dtype))
            reference = copy(params)
        state = initial_train_state(optimizer, params)
        loss = GrpoLoss(workload.config, compute, settings)
        return cls(workload, loss, optimizer, state, reference)

    def update(self, batches: list[GroupBatch[Array]]) -> dict[str, Array]:
        """One optimizer step; its metrics."""
        self.state, metrics = train_step(self.loss, self.optimizer, self.state, batches)
        return jax.block_until_ready((self.state, metrics))[1]

    def with_reference(self, batches: list[GroupBatch[Array]]) -> list[GroupBatch[Array]]:
        """The batches with the reference's log-probabilities."""
        loss, found = self.loss, []
        for batch in batches:
            logprobs = logprobs_of(
                loss.config, loss.compute, loss.settings.temperature, self.reference, batch.rows
            )
            found.append(replace(batch, reference_logprobs=logprobs))
        return jax.block_until_ready(found)


def _random_rollout(workload: Workload) -> Rollout:
    args = workload.args
    shape = (args.prompts, args.group, args.new)
    tokens = np.random.default_rng(1).integers(0, workload.config.text.vocab_size // 2, shape)
    return Rollout(
        tokens.astype(np.int32),
        np.full(shape, -5.0, np.float32),
        workload.length,
        np.zeros(shape[:2], bool),
    )
