"""What the timings of rollout and training run on: a model and synthetic prompts of given sizes."""

import argparse
import math
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
from spatial_ssrl_jax.data.packing import Content, Group, RowShape, fill_rows
from spatial_ssrl_jax.data.processor import Prompt
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
from spatial_ssrl_jax.rl.batch import GroupBatch
from spatial_ssrl_jax.rl.row_shapes import pack_micro_batches, shapes_for
from spatial_ssrl_jax.rollout.engine import Engine, Rollout
from spatial_ssrl_jax.rollout.sampling import Sampling
from spatial_ssrl_jax.trainer.memory import explain_out_of_memory, keep_freed_memory

_BLOCKS = 8  # of the cache of responses up to --new, where their lengths differ

_MEMORY_ADVICE = (
    "lower --micro-batch-rows, --prompts or --new",
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
        "--micro-batch-rows", type=int, help="packed rows of an update's micro-batch; default all"
    )
    parser.add_argument(
        "--row-tokens", type=int, default=0, help="of a row; default what the largest group takes"
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
      prompt: each prompt.
      prompts: a batch of them.
      shape: each prompt, and the longest group.
      length: [B, G] int32 tokens of the samples.
    """

    args: argparse.Namespace
    config: QwenVLConfig
    layout: Layout
    compute: Compute
    prompt: Prompt
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
            prompt,
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

    @property
    def shapes(self) -> tuple[RowShape, ...]:
        """Of an update's rows."""
        args = self.args
        responses, patches = self.shape.group * args.new, len(self.prompt.frame)
        largest = Content(len(self.prompt.ids) + responses, patches, responses)
        tokens = args.row_tokens or largest.tokens
        # Of as many groups of the mean length as are in a row.
        mean = self.length.sum(axis=1).mean()
        count = max(1, math.floor(tokens / (len(self.prompt.ids) + mean)))
        wide = Content(tokens, count * patches, max(math.ceil(1.1 * count * mean), responses))
        for_splash = self.compute.attention.name == "splash"
        return shapes_for(largest, args.new, 1, [wide], for_splash)

    def groups(self, rollout: Rollout) -> list[GroupBatch[Array]]:
        """Micro-batches of a rollout, with random advantages."""
        shape, tokens = rollout.length.shape, rollout.length.sum()
        advantage = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        groups = [
            Group(self.prompt, [t[:n] for t, n in zip(*group, strict=True)])
            for group in zip(rollout.tokens, rollout.length, strict=True)
        ]
        contents, rows = [group.content for group in groups], self.args.micro_batch_rows
        if rows is None:  # all of them
            count = len(pack_micro_batches(contents, self.shapes, 1, self.config))
            rows = -(-count // self.layout.batch_shards) * self.layout.batch_shards
        found = []
        for part in pack_micro_batches(contents, self.shapes, rows, self.config):
            packed, places = fill_rows(groups, part.rows, part.shape, self.config.vision)
            batch = GroupBatch(
                rows=packed,
                weight=places.of_samples(np.full(shape, 1 / tokens, np.float32)),
                normaliser=np.asarray(tokens, np.float32),
                advantage=places.of_samples(advantage),
                sampled_logprobs=places.of_tokens(rollout.logprobs),
                old_logprobs=None,
                reference_logprobs=None,
            )
            found.append(self.layout.put_batch(batch))
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
    for name in ("prompts", "group", "new", "grid", "runs", "micro_batch_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least 1.")
    if args.row_tokens < 0:
        raise UserError(f"--row-tokens={args.row_tokens} must be at least 0.")
