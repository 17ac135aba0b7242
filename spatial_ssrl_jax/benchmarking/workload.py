"""What the timings of rollout and training run on: a model and synthetic prompts of given sizes."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import jax
import numpy as np
from jax import Array

from spatial_ssrl_jax.benchmarking.synthetic_prompts import synthetic_prompt
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.inference.options import default_dtype
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.perf.flops import GroupShape, groups_flops, vision_flops
from spatial_ssrl_jax.perf.response_lengths import parse_lengths
from spatial_ssrl_jax.qwen_vl.compute import Compute, Dtype, Remat
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch
from spatial_ssrl_jax.qwen_vl.kernels import (
    DECODE_KERNELS,
    KERNELS,
    choose_decode_kernel,
    choose_kernel,
)
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.rl.batch import GroupBatch, take_rows
from spatial_ssrl_jax.rollout.engine import Engine, Rollout
from spatial_ssrl_jax.rollout.sampling import Sampling
from spatial_ssrl_jax.trainer.memory import explain_out_of_memory, keep_freed_memory

_BLOCKS = 8  # of the cache of responses up to --new, where their lengths differ

_MEMORY_ADVICE = (
    "lower --micro-batch-prompts, --prompts or --new",
    "set --remat=full",
    "set --dtype=bfloat16",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all of these timings have."""
    parser.add_argument("--model", required=True, help="folder, checkpoint or hub id")
    parser.add_argument("--random-weights", action="store_true", help="read only the config")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=5, help="samples a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a sample at most")
    parser.add_argument(
        "--lengths",
        help="of samples: mean=300,sigma=0.6,cap=2048,correlation=0.4, or a file with one length "
        "or group a line; default all --new",
    )
    parser.add_argument("--grid", type=int, default=20, help="patches along an image's side")
    parser.add_argument("--prompt-tokens", type=int, default=227, help="text and image together")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="float32 on CPU")
    parser.add_argument("--remat", choices=get_args(Remat), default="full")
    parser.add_argument(
        "--micro-batch-prompts", type=int, help="prompts of an update's micro-batch; default all"
    )
    parser.add_argument("--attention", choices=("auto", *KERNELS), default="auto")
    parser.add_argument("--step-attention", choices=("auto", *DECODE_KERNELS), default="auto")
    parser.add_argument("--runs", type=int, default=3, help="timed runs after one to warm up")
    parser.add_argument(
        "--profile",
        metavar="FOLDER",
        help="write a profiler trace of one more run there, for XProf, TensorBoard or Perfetto",
    )


def within_memory(
    run: Callable[[argparse.Namespace], dict[str, Any]],
) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """The timing with an error that names what to change if the device runs out of memory."""
    return explain_out_of_memory(_MEMORY_ADVICE)(run)


@dataclass(frozen=True)
class Workload:
    """A model's shape with synthetic prompts.

    Attributes:
      args: the command line.
      config: the model's shape.
      layout: for training.
      compute: how to compute.
      prompts: the prompts, all alike.
      shape: each prompt, and the longest group.
      length: [B, G] int32 tokens of the samples.
    """

    args: argparse.Namespace
    config: QwenVLConfig
    layout: Layout
    compute: Compute
    prompts: PromptBatch[Array]
    shape: GroupShape
    length: np.ndarray

    @classmethod
    def open(cls, args: argparse.Namespace) -> tuple["Workload", Params]:
        """Makes the prompts, and loads or draws the float32 weights.

        Raises:
          UserError: no model at its path, or sizes that do not fit together.
        """
        _check_sizes(args)
        keep_freed_memory()  # as `train` does
        model = open_model(args.model)
        grid = (1, args.grid, args.grid)
        prompt = synthetic_prompt(model.config, args.prompt_tokens, grid)
        layout = Layout(make_mesh(MeshSettings()))
        dtype = default_dtype(args.dtype)
        kernel = choose_kernel(args.attention, dtype, layout.mesh, "--attention")
        decode_kernel = choose_decode_kernel(
            args.step_attention, dtype, layout.mesh, "--step-attention"
        )
        params = model.init(layout, 0) if args.random_weights else model.load(layout, "float32")
        batch = pad_prompts([prompt] * args.prompts, len(prompt.ids), len(prompt.frame))
        workload = cls(
            args,
            model.config,
            layout,
            Compute(dtype, remat=args.remat, attention=kernel, decode_attention=decode_kernel),
            layout.put_batch(batch),
            GroupShape(len(prompt.ids), (grid,), args.group, args.new),
            _lengths(args),
        )
        return workload, params

    @property
    def engine(self) -> Engine:
        """The engine whose samples run to their lengths; of equal ones in caches of one size."""
        new = self.args.new
        check_every = next(n for n in (8, 4, 2, 1) if new % n == 0)
        block = -(-new // _BLOCKS // check_every) * check_every if self.args.lengths else new
        return Engine(self.config, self.compute, (), block, check_every)

    def passes(self, count: float) -> float:
        """FLOPs of as many forward passes over all groups."""
        vision = vision_flops(self.config, self.shape.grids) * self.args.prompts
        return count * (vision + groups_flops(self.config, self.shape.prompt, self.length))

    @property
    def prompt_index(self) -> np.ndarray:
        """[B] int32, each prompt's index in the step."""
        return np.arange(self.args.prompts, dtype=np.int32)

    def sample(self, params: Params) -> Rollout:
        """One rollout in which every sample runs to its length."""
        engine = self.engine
        return engine.generate(
            params,
            engine.fill(params),
            [self.prompts],
            group_size=self.args.group,
            max_new_tokens=self.args.new,
            key=jax.random.key(0),
            prompt_index=[self.prompt_index],
            sampling=Sampling(),
            stop_at=None if self.args.lengths is None else self.length,
        )

    def groups(self, rollout: Rollout) -> list[GroupBatch[Array]]:
        """Micro-batches of a rollout, groups of like length together, with random advantages."""
        size = self.args.micro_batch_prompts or self.args.prompts
        rng = np.random.default_rng(0)
        shape, tokens = rollout.length.shape, rollout.length.sum()
        advantage = rng.normal(size=shape).astype(np.float32)
        weight = np.full(shape, 1 / tokens, np.float32)
        put, found = self.layout.put_batch, []
        order, block = np.argsort(rollout.length.max(axis=1), kind="stable"), self.engine.kv_block
        for first in range(0, self.args.prompts, size):
            rows = order[first : first + size]
            width = min(-(-int(rollout.length[rows].max()) // block) * block, self.args.new)
            found.append(
                GroupBatch(
                    prompts=take_rows(self.prompts, first, size),
                    tokens=put(rollout.tokens[rows, :, :width]),
                    length=put(rollout.length[rows]),
                    weight=put(weight[rows]),
                    normaliser=put(np.float32(tokens)),
                    advantage=put(advantage[rows]),
                    sampled_logprobs=put(rollout.logprobs[rows, :, :width]),
                    old_logprobs=None,
                    reference_logprobs=None,
                )
            )
        return found


def token_rates(workload: Workload, seconds: float) -> dict[str, float]:
    """Samples a second, and tokens a second with the prompt counted once a sample."""
    samples = workload.length.size
    tokens = samples * workload.shape.prompt + int(workload.length.sum())
    return {"samples_s": samples / seconds, "repeated_tok_s": tokens / seconds}


def _lengths(args: argparse.Namespace) -> np.ndarray:
    """[B, G] int32 tokens of the samples."""
    if args.lengths is None:
        return np.full((args.prompts, args.group), args.new, np.int32)
    drawn = parse_lengths(args.lengths).draw(np.random.default_rng(0), args.prompts, args.group)
    return np.minimum(drawn, args.new)


def _check_sizes(args: argparse.Namespace) -> None:
    for name in ("prompts", "group", "new", "grid", "runs", "micro_batch_prompts"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least 1.")
    micro = args.micro_batch_prompts or args.prompts
    if args.prompts % micro:
        raise UserError(f"--micro-batch-prompts={micro} must divide --prompts={args.prompts}.")
