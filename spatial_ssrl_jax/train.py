"""Trains: python -m spatial_ssrl_jax.train --config=configs/X.py [--config.a.b=v …]"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from spatial_ssrl_jax.config import load_config, split_overrides
from spatial_ssrl_jax.errors import run_command
from spatial_ssrl_jax.run.distributed import add_options, connect


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m spatial_ssrl_jax.train",
        description="Runs a config's stages, from the start or from where the folder stopped.",
        epilog="Any setting is changed by --config.SECTION.NAME=VALUE.",
    )
    parser.add_argument("--config", required=True, help="a Python file such as configs/tiny.py")
    parser.add_argument("--workdir", type=Path, help="where everything is left (runs/NAME)")
    parser.add_argument("--overwrite", action="store_true", help="empty the folder first")
    add_options(parser)
    rest, overrides = split_overrides(argv)
    args = parser.parse_args(rest)
    config = load_config(args.config, overrides)
    connect(args)

    from spatial_ssrl_jax.run.training import train

    train(config, args.workdir or Path("runs") / config.name, args.overwrite)


if __name__ == "__main__":
    run_command(main)
