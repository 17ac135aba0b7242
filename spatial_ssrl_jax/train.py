"""Trains: python -m spatial_ssrl_jax.train --config=configs/X.py [--config.a.b=v …]"""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spatial_ssrl_jax.common.errors import UserError, run_command

if TYPE_CHECKING:
    from etils import epath

    from spatial_ssrl_jax.config.schema import Config


def main(argv: Sequence[str]) -> None:
    # Imported here, where Ctrl-C during the seconds that they take shows no traceback.
    from spatial_ssrl_jax.common.outputs import check_inputs
    from spatial_ssrl_jax.common.paths import user_path
    from spatial_ssrl_jax.config.load import load_config, split_overrides
    from spatial_ssrl_jax.parallel.distributed import add_options, connect
    from spatial_ssrl_jax.trainer.memory import keep_freed_memory
    from spatial_ssrl_jax.trainer.preemption import exit_on_sigterm

    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.train",
        description="Runs a config's stages, from the start or from the folder's last checkpoint.",
        epilog="Any setting is changed by --config.SECTION.NAME=VALUE.",
    )
    parser.add_argument("--config", required=True, help="a Python file such as configs/tiny.py")
    parser.add_argument(
        "--workdir", help="folder of everything that is written (runs/NAME); may be gs://…"
    )
    parser.add_argument("--overwrite", action="store_true", help="empty the folder first")
    parser.add_argument(
        "--check",
        action="store_true",
        help="report problems and the size of the run; nothing is written",
    )
    parser.add_argument("--json", action="store_true", help="with --check: print one JSON object")
    add_options(parser)
    rest, overrides = split_overrides(argv)
    args = parser.parse_args(rest)
    config = load_config(args.config, overrides)
    if args.json and not args.check:
        raise UserError("--json belongs to --check: a run writes its metrics to metrics.jsonl.")
    workdir = user_path(args.workdir or f"runs/{config.name}")
    check_inputs(workdir, args.config)
    with exit_on_sigterm():
        keep_freed_memory()
        connect(args, config.mesh.heartbeat_timeout)
        if args.check:
            _check(config, workdir, args)
            return

        from spatial_ssrl_jax.trainer.training import train

        train(config, workdir, args.overwrite)


def _check(config: "Config", workdir: "epath.Path", args: argparse.Namespace) -> None:
    """Prints what `preflight` finds; its first problem is the command's error."""
    from rich.console import Console

    from spatial_ssrl_jax.trainer.preflight import preflight
    from spatial_ssrl_jax.trainer.preflight_report import print_report

    report = preflight(config, workdir, args.overwrite)
    if args.json:
        print(json.dumps(report))
    else:
        print_report(report, Console())
    if report["problems"]:
        raise UserError(report["problems"][0])


if __name__ == "__main__":
    run_command(main)
