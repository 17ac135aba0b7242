"""Timing the parts of a GRPO step on synthetic prompts: rollout, log-probabilities, update."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatial_ssrl_jax.benchmarking.matmuls import replay, rollout_products
from spatial_ssrl_jax.benchmarking.profile import profiled
from spatial_ssrl_jax.benchmarking.synthetic_prompts import synthetic_prompt
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import GrpoSettings, MeshSettings, OptimSettings
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.perf.device_specs import device_spec
from spatial_ssrl_jax.perf.flops import GroupShape, decode_flops, group_flops
from spatial_ssrl_jax.perf.memory_traffic import (
    decode_bytes,
    rollout_bytes,
    update_bytes,
    weight_bytes,
)
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch
from spatial_ssrl_jax.qwen_vl.kernels import (
    DECODE_KERNELS,
    KERNELS,
    choose_decode_kernel,
    choose_kernel,
)
from spatial_ssrl_jax.qwen_vl.layers import cast
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.rl.batch import GroupBatch
from spatial_ssrl_jax.rl.logprobs import logprobs_of
from spatial_ssrl_jax.rl.losses import GrpoLoss
from spatial_ssrl_jax.rl.optimizer import make_optimizer
from spatial_ssrl_jax.rl.train_step import TrainState, initial_train_state, train_step
from spatial_ssrl_jax.rollout.cache import DecodeState
from spatial_ssrl_jax.rollout.decode import decode_chunk, initial_samples, prefill
from spatial_ssrl_jax.rollout.engine import Engine, Rollout
from spatial_ssrl_jax.rollout.sampling import Sampling, sample_keys
from spatial_ssrl_jax.trainer.memory import explain_out_of_memory, keep_freed_memory


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all of these timings take."""
    parser.add_argument("--model", required=True, help="folder, checkpoint or hub id")
    parser.add_argument("--random-weights", action="store_true", help="read the config alone")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=5, help="samples a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of every sample")
    parser.add_argument("--grid", type=int, default=20, help="patches along an image's side")
    parser.add_argument("--prompt-tokens", type=int, default=227, help="text and image together")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on CPU")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="full")
    parser.add_argument(
        "--micro-batch-prompts", type=int, help="prompts at a time in an update; all"
    )
    parser.add_argument("--attention", choices=("auto", *KERNELS), default="auto")
    parser.add_argument("--step-attention", choices=("auto", *DECODE_KERNELS), default="auto")
    parser.add_argument("--runs", type=int, default=3, help="timed runs after one to warm up")
    parser.add_argument(
        "--profile",
        metavar="FOLDER",
        help="write one more run's trace there, and name the kernels that take the time",
    )


def add_rollout_options(parser: argparse.ArgumentParser) -> None:
    """What only a rollout's timing takes."""
    parser.add_argument(
        "--matmuls",
        action="store_true",
        help="also time the rollout's matmuls alone, and the share of that rate reached",
    )


_MEMORY_ADVICE = (
    "lower --micro-batch-prompts, --prompts or --new",
    "set --remat=full",
    "set --dtype=bfloat16",
)


def within_memory(run: Callable[[argparse.Namespace], dict]) -> Callable:
    """A timing that says in a sentence what to change where the device's memory is too small."""
    return explain_out_of_memory(_MEMORY_ADVICE)(run)


@dataclass
class Bench:
    """A model with synthetic prompts, and what it takes to run a step over them."""

    args: argparse.Namespace
    config: QwenVLConfig
    layout: Layout
    compute: Compute
    params: Params
    prompts: PromptBatch
    shape: GroupShape

    @classmethod
    def open(cls, args: argparse.Namespace) -> "Bench":
        """Loads or draws the model, and makes the prompts.

        Raises:
          UserError: no model there, or sizes that do not fit.
        """
        _check_sizes(args)
        keep_freed_memory()  # as `train` does
        model = open_model(args.model)
        grid = (1, args.grid, args.grid)
        prompt = synthetic_prompt(model.config, args.prompt_tokens, grid)
        layout = Layout(make_mesh(MeshSettings()))
        dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        kernel = choose_kernel(args.attention, dtype, layout.mesh, "--attention")
        step_kernel = choose_decode_kernel(
            args.step_attention, dtype, layout.mesh, "--step-attention"
        )
        params = model.draw(layout, 0) if args.random_weights else model.load(layout, "float32")
        batch = pad_prompts([prompt] * args.prompts, (len(prompt.ids),), (len(prompt.frame),))
        return cls(
            args,
            model.config,
            layout,
            Compute(dtype, remat=args.remat, attention=kernel, decode_attention=step_kernel),
            params,
            layout.put_batch(batch),
            GroupShape(len(prompt.ids), (grid,), args.group, args.new),
        )

    @property
    def check_every(self) -> int:
        """Decode steps between looks at whether all samples have ended."""
        return next(n for n in (8, 4, 2, 1) if self.args.new % n == 0)

    @property
    def engine(self) -> Engine:
        return Engine(self.config, self.compute, (), self.args.new, self.check_every)

    def sample(self, params: Params) -> Rollout:
        """One rollout in which every sample runs to `--new` tokens."""
        engine = self.engine
        return engine.generate(
            params,
            engine.fill(params),
            self.prompts,
            group_size=self.args.group,
            max_new_tokens=self.args.new,
            key=jax.random.key(0),
            prompt_index=self._index,
            sampling=Sampling(),
        )

    def decoder(self, params: Params) -> Callable[[], DecodeState]:
        """The decode steps of `sample` alone: the prompts are run here, once."""
        engine, group, new = self.engine, self.args.group, self.args.new
        weights = engine.fill(params)
        hidden, prefix = prefill(self.config, self.compute, params, self.prompts)
        keys = sample_keys(jax.random.key(0), self._index, group)
        settings = engine.settings(Sampling())
        waiting = [initial_samples(self.config.text, group, new, new, hidden)]

        def decode() -> DecodeState:
            # The last run's state is used up, so that its caches are there once.
            state = replace(waiting.pop(), cursor=jnp.zeros((), jnp.int32))
            state = decode_chunk(self.config, settings, new, weights, prefix, state, keys)
            waiting.append(jax.block_until_ready(state))
            return state

        return decode

    @property
    def _index(self) -> np.ndarray:
        return np.arange(self.args.prompts, dtype=np.int32)

    def groups(self, rollout: Rollout) -> list[GroupBatch]:
        """Micro-batches with advantages drawn at random."""
        size = self.args.micro_batch_prompts or self.args.prompts
        rng = np.random.default_rng(0)
        whole = {
            "tokens": rollout.tokens,
            "length": rollout.length,
            "advantage": rng.normal(size=rollout.length.shape).astype(np.float32),
            "sampled_logprobs": rollout.logprobs,
            "weight": np.full(rollout.length.shape, 1 / rollout.length.sum(), np.float32),
        }
        found = []
        for first in range(0, self.args.prompts, size):
            rows = {k: self.layout.put_batch(v[first : first + size]) for k, v in whole.items()}
            prompts = jax.tree.map(lambda x, a=first: x[a : a + size], self.prompts)
            count = np.float32(rollout.length.sum())
            found.append(
                GroupBatch(
                    prompts, normaliser=count, old_logprobs=None, reference_logprobs=None, **rows
                )
            )
        return found


def _check_sizes(args: argparse.Namespace) -> None:
    for name in ("prompts", "group", "new", "grid", "runs", "micro_batch_prompts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least 1.")
    if args.prompts % (args.micro_batch_prompts or args.prompts):
        raise UserError(
            f"--micro-batch-prompts={args.micro_batch_prompts} must divide --prompts={args.prompts}."
        )


def bench_rollout(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling alone, by the peers' meaning: all sampled tokens over the whole call.

    Metrics that begin with `decode_`, and `--profile`, are of the decode steps alone. With
    `--matmuls`, `matmul_seconds` is the time of the rollout's own matmuls by themselves,
    and `share_of_matmul_bound` how much of that rate the rollout reaches.
    """
    bench = Bench.open(args)
    if args.matmuls and bench.compute.decode_attention.name != "xla":
        raise UserError("--matmuls counts XLA's products alone: set --step-attention=xla with it.")
    params = cast(bench.params, bench.compute.dtype)
    bench.params = None
    whole = _median(partial(bench.sample, params), args.runs)
    account = (bench.config, bench.compute.dtype, bench.shape, args.prompts)
    found = {"rollout_tok_s": args.prompts * args.group * args.new / whole}
    if args.matmuls:
        bound = _matmul_seconds(bench, params)
        found |= {"matmul_seconds": bound, "share_of_matmul_bound": bound / whole}
    decode = bench.decoder(params)
    found |= _decode_figures(bench, decode)
    flops = args.prompts * group_flops(bench.config, bench.shape)
    return _report(args, flops, rollout_bytes(*account), whole, found, decode)


def _decode_figures(bench: Bench, decode: Callable[[], Any]) -> dict[str, float | None]:
    """Rate of the decode steps alone, and their shares of what bounds them.

    `decode_roofline_seconds` is the larger of a step's useful bytes over the memory's bandwidth and
    its useful FLOPs over the peak, both of the datasheet.
    """
    args, peak, devices = bench.args, device_spec(), jax.device_count()
    seconds = _median(decode, args.runs) / args.new
    moved = decode_bytes(bench.config, bench.compute.dtype, bench.shape, args.prompts) / args.new
    flops = args.prompts * decode_flops(bench.config, bench.shape) / args.new
    found = {
        "decode_tok_s": args.prompts * args.group / seconds,
        "decode_step_seconds": seconds,
        "decode_bytes_per_step": moved,
        "decode_flops_per_step": flops,
        "decode_roofline_seconds": None,
        "decode_share_of_roofline": None,
    }
    if peak:
        bound = max(moved / peak.bandwidth, flops / peak.flops) / devices
        found |= {
            "decode_roofline_seconds": bound,
            "decode_share_of_roofline": bound / seconds,
        }
    return found


def _matmul_seconds(bench: Bench, params: Params) -> float:
    """Median seconds of the matmuls of prefill and decode alone, as one program."""
    args = bench.args
    products = rollout_products(
        bench.config, bench.compute, params, bench.prompts, args.group, args.new
    )
    program, operands = replay(*products, turns=args.new)
    return _median(lambda: jax.block_until_ready(program(operands)), args.runs)


def bench_update(args: argparse.Namespace) -> dict[str, Any]:
    """One optimizer step over groups of random tokens, without KL."""
    bench = Bench.open(args)
    trainer = _Trainer.make(bench, kl=0.0)
    run = partial(trainer.update, bench.groups(_random_rollout(bench)))
    seconds = _median(run, args.runs)
    flops = 3 * args.prompts * group_flops(bench.config, bench.shape)
    moved = update_bytes(bench.config, bench.compute.dtype)
    return _report(args, flops, moved, seconds, {"step_seconds": seconds}, run)


def bench_step(args: argparse.Namespace) -> dict[str, Any]:
    """One whole GRPO step: rollout, reference log-probabilities, update.

    `mismatch_max` and `mismatch_mean` are between the sampler's and the trainer's log-probabilities
    of the sampled tokens, in nats, before vision tokens are suppressed, in the last step.
    """
    bench = Bench.open(args)
    trainer = _Trainer.make(bench, kl=0.01)
    laps: list[dict[str, float]] = []
    metrics: dict[str, Any] = {}

    def step() -> None:
        start = time.perf_counter()
        rollout = bench.sample(trainer.state.params)
        sampled = time.perf_counter()
        batches = trainer.with_reference(bench.groups(rollout))
        compared = time.perf_counter()
        metrics.update(trainer.update(batches))
        laps.append(
            {
                "rollout_seconds": sampled - start,
                "reference_seconds": compared - sampled,
                "update_seconds": time.perf_counter() - compared,
            }
        )

    seconds = _median(step, args.runs)
    phases = {name: statistics.median(lap[name] for lap in laps[1:]) for name in laps[0]}
    mismatch = {f"mismatch_{k}": float(metrics[f"mismatch/logprob_{k}"]) for k in ("max", "mean")}
    flops = 5 * args.prompts * group_flops(bench.config, bench.shape)
    config, dtype = bench.config, bench.compute.dtype
    moved = rollout_bytes(config, dtype, bench.shape, args.prompts)
    moved += weight_bytes(config, dtype) + update_bytes(config, dtype)
    found = {"step_seconds": seconds, **phases, **mismatch}
    return _report(args, flops, moved, seconds, found, step)


@dataclass
class _Trainer:
    """The state that updates continue from, and the reference."""

    loss: GrpoLoss
    optimizer: Any
    state: TrainState
    reference: Params | None

    @classmethod
    def make(cls, bench: Bench, kl: float) -> "_Trainer":
        settings = GrpoSettings(kl_coef=kl, minibatches_per_rollout=1)
        optimizer = make_optimizer(OptimSettings(), settings, 1)
        reference = None
        if kl:
            copy = jax.jit(lambda p: cast(jax.tree.map(lambda x: x + 0, p), bench.compute.dtype))
            reference = copy(bench.params)
        state, bench.params = initial_train_state(optimizer, bench.params), None
        return cls(GrpoLoss(bench.config, bench.compute, settings), optimizer, state, reference)

    def update(self, batches: list[GroupBatch]) -> dict[str, jax.Array]:
        self.state, metrics = train_step(self.loss, self.optimizer, self.state, batches)
        return jax.block_until_ready((self.state, metrics))[1]

    def with_reference(self, batches: list[GroupBatch]) -> list[GroupBatch]:
        loss = self.loss

        def compared(batch: GroupBatch) -> GroupBatch:
            found = logprobs_of(
                loss.config, loss.compute, loss.settings.temperature, self.reference, batch
            )
            return replace(batch, reference_logprobs=found)

        return jax.block_until_ready([compared(batch) for batch in batches])


def _random_rollout(bench: Bench) -> Rollout:
    shape = (bench.args.prompts, bench.args.group, bench.args.new)
    tokens = np.random.default_rng(1).integers(0, bench.config.text.vocab_size // 2, shape)
    return Rollout(
        tokens.astype(np.int32),
        np.full(shape, -5.0, np.float32),
        np.full(shape[:2], bench.args.new, np.int32),
        np.zeros(shape[:2], bool),
    )


def _median(run: Callable[[], Any], runs: int) -> float:
    """Median seconds of `runs` runs after one that compiles."""
    run()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _report(
    args: argparse.Namespace,
    flops: float,
    moved: float,
    seconds: float,
    found: dict[str, float | None],
    run: Callable[[], Any],
) -> dict[str, Any]:
    """The timing with what was timed, on what, and its shares of the device's peaks.

    Args:
      args: the command line.
      flops: useful ones, of `cost/flops.py`: matmuls without padding and recomputation.
      moved: useful bytes, of `cost/traffic.py`: weights, caches, gradients and optimizer state.
      seconds: median of the timed runs.
      found: other metrics.
      run: what was timed, to be profiled.

    Returns:
      Shares are of all devices together, and None where the device's peak is not known.
    """
    peak, devices = device_spec(), jax.device_count()
    return {
        **found,
        "seconds": seconds,
        "useful_flops": flops,
        "flops_per_second": flops / seconds,
        "share_of_peak": flops / seconds / (peak.flops * devices) if peak else None,
        "useful_bytes": moved,
        "bytes_per_second": moved / seconds,
        "share_of_bandwidth": moved / seconds / (peak.bandwidth * devices) if peak else None,
        "device": jax.devices()[0].device_kind,
        "prompts": args.prompts,
        "group": args.group,
        "new": args.new,
        "prompt_tokens": args.prompt_tokens,
        "runs": args.runs,
        **(profiled(run, args.profile) if args.profile else {}),
    }
