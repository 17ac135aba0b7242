"""Options of the commands that generate with a model: how images are shown and tokens drawn."""

import argparse
from typing import get_args

import jax

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.compute import Dtype
from spatial_ssrl_jax.rollout.sampling import Sampling


def add_inference_options(
    parser: argparse._ActionsContainer, new_tokens: int | None, by: str = "the model"
) -> None:
    """Adds `--min-pixels` to `--dtype` to a command.

    Args:
      parser: of the command, or a group of its options.
      new_tokens: default max tokens of a response; None leaves it to the command.
      by: what the help texts name as the source of a default.
    """
    for name in ("--min-pixels", "--max-pixels"):
        parser.add_argument(name, type=int, help=f"area of an image or frame: by {by}")
    length = f"by {by}" if new_tokens is None else "of a response"
    parser.add_argument("--max-new-tokens", type=int, default=new_tokens, help=length)
    parser.add_argument("--samples", type=int, default=1, help="of each question")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=get_args(Dtype), help="float32 on CPU")


def check_inference_options(args: argparse.Namespace) -> Sampling:
    """Checks the options; returns how tokens are drawn.

    Raises:
      UserError: a value is out of range.
    """
    if args.samples < 1 or (args.max_new_tokens is not None and args.max_new_tokens < 1):
        raise UserError("--samples and --max-new-tokens must be at least 1.")
    if min((n for n in (args.min_pixels, args.max_pixels) if n is not None), default=1) < 1:
        raise UserError("--min-pixels and --max-pixels must be at least 1.")
    if not 0 <= args.seed < 2**31:
        raise UserError("--seed must be at least 0 and below 2147483648.")
    if not args.temperature >= 0 or not 0 < args.top_p <= 1:
        raise UserError("--temperature must be at least 0, and --top-p above 0 and at most 1.")
    return Sampling(args.temperature, args.top_p)


def default_dtype(dtype: Dtype | None) -> Dtype:
    """`--dtype`, or where it is not given float32 on CPU and bfloat16 elsewhere."""
    return dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
