"""Joining the processes of one run, before any device is asked for."""

import argparse

import jax

from spatial_ssrl_jax.errors import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `connect` needs to a command's options."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed", action="store_true", help="join as the TPU VM or SLURM environment says"
    )
    group.add_argument("--coordinator", help="HOST:PORT of process 0, where nothing else says it")
    group.add_argument("--processes", type=int, help="how many there are")
    group.add_argument("--process", type=int, help="which this one is, from 0")


def connect(args: argparse.Namespace) -> None:
    """Joins the other processes; a single process needs nothing.

    Raises:
      UserError: the options do not belong together, or the others cannot be reached.
    """
    explicit = (args.coordinator, args.processes, args.process)
    if all(option is None for option in explicit) and not args.distributed:
        return
    if any(option is None for option in explicit) and not args.distributed:
        raise UserError("--coordinator, --processes and --process belong together: give all three.")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(*explicit)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the processes cannot join ({first}): check --coordinator.") from error
