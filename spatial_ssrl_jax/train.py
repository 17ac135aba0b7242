"""Trains: python -m spatial_ssrl_jax.train --config=configs/X.py [--config.a.b=v …]"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from spatial_ssrl_jax.config import Config, load_config, split_overrides
from spatial_ssrl_jax.errors import UserError, run_command
from spatial_ssrl_jax.run.distributed import add_options, connect
from spatial_ssrl_jax.run.preemption import nothing_to_save


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.train",
        description="Runs a config's stages, from the start or from where the folder stopped.",
        epilog="Any setting is changed by --config.SECTION.NAME=VALUE.",
    )
    parser.add_argument("--config", required=True, help="a Python file such as configs/tiny.py")
    parser.add_argument("--workdir", help="where everything is left (runs/NAME)")
    parser.add_argument("--overwrite", action="store_true", help="empty the folder first")
    parser.add_argument(
        "--check",
        action="store_true",
        help="say what would go wrong and how large the run is; nothing is written",
    )
    parser.add_argument("--json", action="store_true", help="of --check: print one JSON object")
    add_options(parser)
    rest, overrides = split_overrides(argv)
    args = parser.parse_args(rest)
    config = load_config(args.config, overrides)
    if args.json and not args.check:
        raise UserError("--json belongs to --check: a run leaves its figures in metrics.jsonl.")
    if args.workdir and "://" in args.workdir:
        raise UserError(
            f"--workdir={args.workdir} cannot be written to: give a local folder, and copy it from "
            "there."
        )
    with nothing_to_save():
        connect(args, config.mesh.silence)
        workdir = Path(args.workdir or Path("runs") / config.name)
        if args.check:
            _check(config, workdir, args)
            return

        from spatial_ssrl_jax.run.training import train

        train(config, workdir, args.overwrite)


def _check(config: Config, workdir: Path, args: argparse.Namespace) -> None:
    from rich.console import Console

    from spatial_ssrl_jax.run.check import check, show

    report = check(config, workdir, args.overwrite)
    if args.json:
        print(json.dumps(report))
    else:
        show(report, Console())
    if report["problems"]:
        raise UserError(report["problems"][0])


if __name__ == "__main__":
    run_command(main)
