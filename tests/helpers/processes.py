"""Starting several processes of one run, each with its own devices on this machine's CPU."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from tests.conftest import ROOT


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_all(
    command: Sequence[str], count: int, devices: int = 1, join: bool = True, **env: str
) -> list[subprocess.Popen]:
    """Starts `python *command` as `count` processes, with options to join where there are several.

    Args:
      command: after `python`.
      count: processes.
      devices: of each.
      join: give them the options that name process 0.
      env: further variables; `{process}` in a value becomes the process's number.
    """
    port, own = free_port(), {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    started = []
    for process in range(count):
        options = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}"]
        options = [*options, f"--process={process}"] if join and count > 1 else []
        more = {name: value.format(process=process) for name, value in env.items()}
        started.append(
            subprocess.Popen(
                [sys.executable, *command, *options],
                env=os.environ | own | {"JAX_PLATFORMS": "cpu"} | more,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def printed(script: str, devices: int) -> list[float]:
    """The numbers that a Python script prints in a process with `devices` devices."""
    (process,) = start_all(["-c", script], 1, devices)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return [float(line) for line in out.split()]


def until(process: subprocess.Popen, begins: str) -> None:
    """Reads a process's output up to a line that begins so; libraries print lines too."""
    for line in process.stdout:
        if line.startswith(begins):
            return
    raise AssertionError(process.stderr.read())
