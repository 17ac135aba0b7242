"""Joining the processes of one run, before any device is asked for."""

import argparse
import atexit
import os
import time
from contextlib import suppress

import jax
from jax._src import distributed  # the only way to the service's shared notes

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.parallel.compiler import set_compiler_flags

_PARTED = "parted/"
_PATIENCE = 10  # seconds that process 0 waits for the others' ends


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `connect` needs to a command's options."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed", action="store_true", help="join as the TPU VM or SLURM environment says"
    )
    group.add_argument("--coordinator", help="HOST:PORT of process 0, where nothing else says it")
    group.add_argument("--processes", type=int, help="how many there are")
    group.add_argument("--process", type=int, help="which this one is, from 0")
    group.add_argument(
        "--join-seconds", type=int, default=300, help="how long to wait for the others (300)"
    )


def connect(args: argparse.Namespace, silence: int) -> None:
    """Joins the other processes; a single process needs nothing.

    Args:
      args: what `add_options` added.
      silence: seconds after which a process that was not heard of counts as lost.

    Raises:
      UserError: the options do not belong together, the environment speaks of several processes
        and no option does, or the others cannot be reached.
    """
    set_compiler_flags()
    explicit = (args.coordinator, args.processes, args.process)
    if all(option is None for option in explicit) and not args.distributed:
        _check_alone()
        return
    if any(option is None for option in explicit) and not args.distributed:
        raise UserError("--coordinator, --processes and --process belong together: give all three.")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # `Watch` and `Preemption` do what these would: the one with a sentence, the other by the step.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *explicit,
            initialization_timeout=args.join_seconds,
            heartbeat_timeout_seconds=2 * silence,
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the processes cannot join ({first}): check --coordinator.") from error
    atexit.register(_part)


def _part() -> None:
    """Lets process 0 go last: it takes along the service that joined them, and the library aborts
    whoever signs off from one that is gone."""
    state = distributed.global_state
    if state.client is None:
        return
    if state.process_id:
        with suppress(jax.errors.JaxRuntimeError):
            state.client.key_value_set(f"{_PARTED}{state.process_id}", "")
        jax.distributed.shutdown()
        return
    end = time.monotonic() + _PATIENCE
    for process in range(1, state.num_processes):
        left = max(0.0, end - time.monotonic())
        with suppress(jax.errors.JaxRuntimeError):  # it is lost, and has no one to sign off to
            state.client.blocking_key_value_get(f"{_PARTED}{process}", int(1000 * left))
    time.sleep(1)  # that a sign-off takes after its note


def _check_alone() -> None:
    """Refuses to be one of several processes that know nothing of each other.

    Raises:
      UserError: SLURM or a TPU slice says that there are several.
    """
    steps, hosts = (
        os.environ.get("SLURM_STEP_NUM_TASKS", ""),
        os.environ.get("TPU_WORKER_HOSTNAMES", ""),
    )
    for what, count in (
        ("SLURM's step has", int(steps) if steps.isdigit() else 1),
        ("this TPU slice has", len(hosts.split(","))),
    ):
        if count > 1:
            raise UserError(
                f"{what} {count} processes, and nothing says that they belong together: give "
                "--distributed to each of them."
            )
