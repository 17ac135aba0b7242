"""Joining the processes of one run, before JAX looks for devices."""

import argparse
import atexit
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import jax
from jax._src import distributed  # no public API has the key-value store

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.parallel.compiler import set_compiler_flags

_READY = "ready/"
_SIGNED_OFF = "signed_off/"
_SIGN_OFF_SECONDS = 10  # that process 0 waits for the others


class KeyValueClient(Protocol):
    """The key-value store that the processes share, in JAX's coordination service."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that `connect` joined.

    Attributes:
      client: their key-value store; None for a single process.
      process_id: this process, from 0.
      num_processes: how many there are.
    """

    client: KeyValueClient | None
    process_id: int
    num_processes: int


def process_group() -> ProcessGroup:
    """The processes of this run; the only use of JAX's private state."""
    state = distributed.global_state
    count = state.num_processes if state.client is not None else 1
    return ProcessGroup(state.client, state.process_id, count)


def await_primary(name: str, seconds: int) -> None:
    """Returns once process 0 has called it with this name, by the key-value store.

    Collectives give up after half a minute where a process does not take part; process 0 may take
    longer for what it does alone.
    """
    group = process_group()
    if group.client is None:
        return
    if group.process_id == 0:
        group.client.key_value_set(_READY + name, "ready", allow_overwrite=True)
    else:
        group.client.blocking_key_value_get(_READY + name, 1000 * seconds)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `connect` reads to a command."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed", action="store_true", help="join as the TPU VM or SLURM environment says"
    )
    group.add_argument("--coordinator", help="HOST:PORT of process 0, without --distributed")
    group.add_argument("--processes", type=int, help="number of processes")
    group.add_argument("--process", type=int, help="index of this process, from 0")
    group.add_argument(
        "--join-seconds", type=int, default=300, help="how long to wait for the others (300)"
    )


def connect(args: argparse.Namespace, heartbeat_timeout: int) -> None:
    """Joins the other processes; a single process needs no options.

    Args:
      args: the options of `add_options`.
      heartbeat_timeout: seconds without a heartbeat after which a process counts as lost.

    Raises:
      UserError: the options do not belong together, the environment has several processes and no
        option joins them, or the others cannot be reached.
    """
    set_compiler_flags()
    explicit = (args.coordinator, args.processes, args.process)
    if all(option is None for option in explicit) and not args.distributed:
        _check_single_process()
        return
    if any(option is None for option in explicit) and not args.distributed:
        raise UserError("--coordinator, --processes and --process belong together: give all three.")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # `Watchdog` and `Preemption` replace these: with a clear message, and between steps.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *explicit,
            initialization_timeout=args.join_seconds,
            heartbeat_timeout_seconds=2 * heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes cannot join ({error_line(error)}): check --coordinator."
        ) from error
    atexit.register(_sign_off)


def _sign_off() -> None:
    """Lets process 0 end last: it hosts the coordination service, and JAX aborts a process that
    signs off after the service has ended."""
    group = process_group()
    if group.client is None:
        return
    if group.process_id:
        with suppress(jax.errors.JaxRuntimeError):
            group.client.key_value_set(f"{_SIGNED_OFF}{group.process_id}", "")
        jax.distributed.shutdown()
        return
    end = time.monotonic() + _SIGN_OFF_SECONDS
    for process in range(1, group.num_processes):
        left = max(0.0, end - time.monotonic())
        with suppress(jax.errors.JaxRuntimeError):  # that process is lost
            group.client.blocking_key_value_get(f"{_SIGNED_OFF}{process}", int(1000 * left))
    time.sleep(1)  # for the `shutdown` that follows a process's key


def _check_single_process() -> None:
    """Refuses to run as one of several processes that are not joined.

    Raises:
      UserError: the environment of SLURM or of a TPU slice has several processes.
    """
    steps = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    for what, count in (
        ("SLURM's step has", int(steps) if steps.isdigit() else 1),
        ("this TPU slice has", len(hosts.split(","))),
    ):
        if count > 1:
            raise UserError(
                f"{what} {count} processes, which no option joins: give --distributed to each of "
                "them."
            )
