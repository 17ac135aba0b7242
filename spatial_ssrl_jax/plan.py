"""Plans a run: python -m spatial_ssrl_jax.plan --config=configs/X.py --topology=v5e:4x4"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial

from spatial_ssrl_jax.common.errors import UserError, run_command


def main(argv: Sequence[str]) -> int:
    from spatial_ssrl_jax.config.load import load_config, split_overrides

    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.plan",
        description="Compiles every program of a run ahead of time, without the devices: memory, "
        "FLOPs, bytes and minimum time of each. Exits with 1 when one does not fit.",
        epilog="--config.SECTION.NAME=VALUE overrides any setting.",
    )
    parser.add_argument("--config", required=True, help="a Python file such as configs/tiny.py")
    parser.add_argument(
        "--topology",
        required=True,
        help="v5e:4x4, v6e:4x4 or v5p:2x2x4, optionally followed by ,slices=2; h100, a100-80gb or "
        "rtx4090; or cpu",
    )
    parser.add_argument(
        "--lengths",
        help="of responses, for the time of a GRPO step: mean=300,sigma=0.6,cap=2048,"
        "correlation=0.4, or a file with one length or group a line; default all the longest",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, help="of each prompt, with --lengths; default the longest"
    )
    parser.add_argument(
        "--prompt-patches",
        type=int,
        help="of each prompt's images; default as many a token as the longest prompt has",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    rest, overrides = split_overrides(argv)
    args = parser.parse_args(rest)
    config = load_config(args.config, overrides)

    from spatial_ssrl_jax.perf.response_lengths import parse_lengths
    from spatial_ssrl_jax.planning.planner import plan
    from spatial_ssrl_jax.planning.programs import RolloutLengths
    from spatial_ssrl_jax.planning.report import lines

    lengths = None
    if args.lengths is not None:
        from spatial_ssrl_jax.data.processor import PromptSize
        from spatial_ssrl_jax.rl.bucketing import Buckets

        largest, tokens, patches = config.data.buckets[-1], args.prompt_tokens, args.prompt_patches
        for name, count in (("tokens", tokens), ("patches", patches)):
            if count is not None and count < 1:
                raise UserError(f"--prompt-{name}={count} must be at least 1.")
        tokens = tokens or largest[0]
        patches = patches or math.ceil(largest[1] * tokens / largest[0])
        bucket = Buckets.of(config).shape(tokens, patches)
        responses = parse_lengths(args.lengths)
        lengths = RolloutLengths(responses, PromptSize(tokens, patches), bucket)
    elif args.prompt_tokens is not None or args.prompt_patches is not None:
        raise UserError("--prompt-tokens and --prompt-patches go with --lengths: give it too.")
    found = plan(config, args.topology, partial(print, file=sys.stderr, flush=True), lengths)
    print(json.dumps(found.as_json()) if args.json else "\n".join(lines(found)))
    return 0 if found.fits else 1


if __name__ == "__main__":
    run_command(main)
