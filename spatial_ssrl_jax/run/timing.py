"""Timing the parts of a GRPO step on made-up prompts: rollout, log-probabilities, update."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from spatial_ssrl_jax.config import GrpoSettings, MeshSettings, OptimSettings
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.data.prompts import Prompt
from spatial_ssrl_jax.data.windows import Grid, lay_out_windows, merged_tokens, mrope_positions
from spatial_ssrl_jax.errors import UserError
from spatial_ssrl_jax.learn.batch import GroupBatch
from spatial_ssrl_jax.learn.logprobs import logprobs_of
from spatial_ssrl_jax.learn.loss import GrpoLoss
from spatial_ssrl_jax.learn.optimizer import make_optimizer
from spatial_ssrl_jax.learn.update import TrainState, new_state, train_step
from spatial_ssrl_jax.qwen2_5_vl.config import Qwen2_5_VLConfig
from spatial_ssrl_jax.qwen2_5_vl.layers import cast
from spatial_ssrl_jax.qwen2_5_vl.model import Compute, Params, PromptBatch, abstract_params
from spatial_ssrl_jax.rollout.cache import token_bytes
from spatial_ssrl_jax.rollout.engine import Engine, Rollout
from spatial_ssrl_jax.rollout.sampling import Sampling
from spatial_ssrl_jax.run.devices import peak_flops
from spatial_ssrl_jax.run.flops import Shape, group_flops
from spatial_ssrl_jax.run.mesh import Layout, make_mesh
from spatial_ssrl_jax.run.models import open_model

OnTokens = Callable[[np.ndarray, np.ndarray], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all of these timings take."""
    parser.add_argument("--model", required=True, help="folder, checkpoint or hub id")
    parser.add_argument("--random-weights", action="store_true", help="read the config alone")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=5, help="samples a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of every sample")
    parser.add_argument("--grid", type=int, default=20, help="patches along a picture's side")
    parser.add_argument("--prompt-tokens", type=int, default=227, help="text and picture together")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on CPU")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="full")
    parser.add_argument("--micro-prompts", type=int, help="prompts at a time in an update; all")
    parser.add_argument("--runs", type=int, default=3, help="timed runs after one to warm up")


@dataclass
class Bench:
    """A model with made-up prompts, and what it takes to run a step over them."""

    args: argparse.Namespace
    config: Qwen2_5_VLConfig
    layout: Layout
    compute: Compute
    params: Params
    prompts: PromptBatch
    shape: Shape

    @classmethod
    def open(cls, args: argparse.Namespace) -> "Bench":
        """Loads or draws the model, and makes the prompts.

        Raises:
          UserError: no model there, or sizes that do not fit.
        """
        _check_sizes(args)
        model = open_model(args.model)
        grid = (1, args.grid, args.grid)
        prompt = made_up_prompt(model.config, args.prompt_tokens, grid)
        layout = Layout(make_mesh(MeshSettings()))
        dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        params = model.draw(layout, 0) if args.random_weights else model.load(layout, "float32")
        batch = pad_prompts([prompt] * args.prompts, (len(prompt.ids),), (len(prompt.frame),))
        return cls(
            args,
            model.config,
            layout,
            Compute(dtype, remat=args.remat),
            params,
            layout.put_batch(batch),
            Shape(len(prompt.ids), (grid,), args.group, args.new),
        )

    @property
    def check_every(self) -> int:
        """Decode steps between looks at whether all samples have ended."""
        return next(n for n in (8, 4, 2, 1) if self.args.new % n == 0)

    def sample(self, params: Params, on_tokens: OnTokens | None = None) -> Rollout:
        """One rollout in which every sample runs to `--new` tokens."""
        new = self.args.new
        engine = Engine(self.config, self.compute, (), new, self.check_every)
        return engine.generate(
            params,
            engine.fill(params),
            self.prompts,
            group=self.args.group,
            limit=new,
            key=jax.random.key(0),
            prompt_index=np.arange(self.args.prompts, dtype=np.int32),
            sampling=Sampling(),
            on_tokens=on_tokens,
        )

    def decode_seconds(self, params: Params) -> float:
        """Seconds from the first look at a rollout's tokens, after `check_every`, to the last."""
        looks: list[float] = []
        self.sample(params, lambda *_: looks.append(time.perf_counter()))
        return looks[-1] - looks[0]

    def groups(self, rollout: Rollout) -> list[GroupBatch]:
        """Micro-batches with advantages drawn at random."""
        size = self.args.micro_prompts or self.args.prompts
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
    for name in ("prompts", "group", "new", "grid", "runs", "micro_prompts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least 1.")
    if args.prompts % (args.micro_prompts or args.prompts):
        raise UserError(
            f"--micro-prompts={args.micro_prompts} must divide --prompts={args.prompts}."
        )


def made_up_prompt(config: Qwen2_5_VLConfig, tokens: int, grid: Grid) -> Prompt:
    """One picture of random pixels, then words; `tokens` in all."""
    picture = merged_tokens(config.vision, grid)
    if tokens <= picture + 2 or grid[1] % 2:
        raise UserError(
            f"--prompt-tokens={tokens} and --grid={grid[1]} do not fit: the grid must be even and "
            f"its picture alone takes {picture + 2} tokens."
        )
    rng = np.random.default_rng(0)
    ids = [config.vision_start_token_id, *[config.image_token_id] * picture]
    ids += [config.vision_end_token_id]
    words = rng.integers(0, min(config.text.vocab_size // 2, 10_000), tokens - len(ids))
    ids = np.array([*ids, *words], np.int32)
    is_vision = ids == config.image_token_id
    position = mrope_positions(config.vision, is_vision, [grid], [None])
    layout = lay_out_windows(config.vision, [grid])
    index = np.full(len(ids), -1, np.int32)
    index[is_vision] = layout.merged
    pixels = rng.normal(size=(*layout.source.shape, config.vision.patch_dim)).astype(np.float32)
    return Prompt(
        ids, position, int(position.max()) + 1, index, pixels, layout.frame, layout.coords
    )


def bench_rollout(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling alone, by the peers' meaning: all sampled tokens over the whole call."""
    bench = Bench.open(args)
    params = cast(bench.params, bench.compute.dtype)
    bench.params = None
    whole = _median(lambda: bench.sample(params), args.runs)
    decode = [bench.decode_seconds(params) for _ in range(args.runs + 1)][1:]
    samples, later = args.prompts * args.group, args.new - bench.check_every
    flops = args.prompts * group_flops(bench.config, bench.shape)
    return _report(
        args,
        seconds=whole,
        flops=flops,
        rollout_tok_s=samples * args.new / whole,
        decode_tok_s=samples * later / statistics.median(decode) if later else None,
        decode_bytes_per_step=_decode_bytes(bench),
    )


def bench_update(args: argparse.Namespace) -> dict[str, Any]:
    """One optimizer step over groups of random tokens, without KL."""
    bench = Bench.open(args)
    trainer = _Trainer.make(bench, kl=0.0)
    batches = bench.groups(_random_rollout(bench))
    seconds = _median(lambda: trainer.update(batches), args.runs)
    flops = 3 * args.prompts * group_flops(bench.config, bench.shape)
    return _report(args, step_seconds=seconds, flops=flops, seconds=seconds)


def bench_step(args: argparse.Namespace) -> dict[str, Any]:
    """One whole GRPO step: rollout, reference log-probabilities, update."""
    bench = Bench.open(args)
    trainer = _Trainer.make(bench, kl=0.01)
    laps: list[dict[str, float]] = []

    def step() -> None:
        start = time.perf_counter()
        rollout = bench.sample(trainer.state.params)
        sampled = time.perf_counter()
        batches = trainer.with_reference(bench.groups(rollout))
        compared = time.perf_counter()
        trainer.update(batches)
        laps.append(
            {
                "rollout_seconds": sampled - start,
                "reference_seconds": compared - sampled,
                "update_seconds": time.perf_counter() - compared,
            }
        )

    seconds = _median(step, args.runs)
    phases = {name: statistics.median(lap[name] for lap in laps[1:]) for name in laps[0]}
    flops = 5 * args.prompts * group_flops(bench.config, bench.shape)
    return _report(args, step_seconds=seconds, flops=flops, seconds=seconds, **phases)


@dataclass
class _Trainer:
    """The state that updates go on from, and the reference."""

    loss: GrpoLoss
    optimizer: Any
    state: TrainState
    reference: Params | None

    @classmethod
    def make(cls, bench: Bench, kl: float) -> "_Trainer":
        settings = GrpoSettings(kl_coefficient=kl, updates=1)
        optimizer = make_optimizer(OptimSettings(), settings, 1)
        reference = None
        if kl:
            copy = jax.jit(lambda p: cast(jax.tree.map(lambda x: x + 0, p), bench.compute.dtype))
            reference = copy(bench.params)
        state, bench.params = new_state(optimizer, bench.params), None
        return cls(GrpoLoss(bench.config, bench.compute, settings), optimizer, state, reference)

    def update(self, batches: list[GroupBatch]) -> None:
        self.state, metrics = train_step(self.loss, self.optimizer, self.state, batches)
        jax.block_until_ready((self.state, metrics))

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


def _decode_bytes(bench: Bench) -> float:
    """Bytes that one decode step cannot do without: weights, prompts' caches, half the own ones."""
    text, size = bench.config.text, np.dtype(bench.compute.dtype).itemsize
    weights = sum(x.size for x in jax.tree.leaves(abstract_params(bench.config)["text"])) * size
    args = bench.args
    cached = args.prompts * (bench.shape.prompt + args.group * args.new / 2)
    return float(weights + token_bytes(text, bench.compute.dtype) * cached)


def _report(args: argparse.Namespace, flops: float, seconds: float, **found: float) -> dict:
    """The timing with what was timed, on what, and its share of the device's peak."""
    peak = peak_flops()
    rate = flops / seconds
    return {
        **found,
        "seconds": seconds,
        "useful_flops": flops,
        "flops_per_second": rate,
        "share_of_peak": rate / (peak * jax.device_count()) if peak else None,
        "device": jax.devices()[0].device_kind,
        "prompts": args.prompts,
        "group": args.group,
        "new": args.new,
        "prompt_tokens": args.prompt_tokens,
        "runs": args.runs,
    }
