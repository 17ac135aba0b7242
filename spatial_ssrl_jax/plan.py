"""Plans: python -m spatial_ssrl_jax.plan --config=configs/X.py --topology=v5e:4x4"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial

from spatial_ssrl_jax.common.errors import run_command
from spatial_ssrl_jax.config.load import load_config, split_overrides


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.plan",
        description="Compiles every program of a run for devices that need not be there: memory, "
        "FLOPs, bytes and the least time of each. Exits with 1 when something does not fit.",
        epilog="Any setting is changed by --config.SECTION.NAME=VALUE.",
    )
    parser.add_argument("--config", required=True, help="a Python file such as configs/tiny.py")
    parser.add_argument(
        "--topology",
        required=True,
        help="v5e:4x4, v6e:4x4 or v5p:2x2x4, perhaps with ,slices=2 after it; h100, a100-80gb or "
        "rtx4090; or cpu",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    rest, overrides = split_overrides(argv)
    args = parser.parse_args(rest)
    config = load_config(args.config, overrides)

    from spatial_ssrl_jax.planning.planner import plan
    from spatial_ssrl_jax.planning.report import lines

    report = plan(config, args.topology, say=partial(print, file=sys.stderr, flush=True))
    print(json.dumps(report) if args.json else "\n".join(lines(report)))
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    run_command(main)
