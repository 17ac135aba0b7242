"""Ends all processes of a run when one of them is lost, fails or hangs.

Each process has two threads: one exchanges heartbeats with the others through JAX's coordination
service, and one checks the timeouts, since the first may block. The service runs in process 0, and
JAX aborts the others when it ends: a shell that outlives this process then prints the reason.
"""

import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType

import jax

from spatial_ssrl_jax.common.errors import EXIT_PEER_LOST, exit_now, explain
from spatial_ssrl_jax.common.text import error_line
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.parallel.distributed import KeyValueClient, process_group

_HEARTBEAT, _EXIT = "watchdog/heartbeat/", "watchdog/exit/"
_RESUMES = "the same command resumes after the newest checkpoint."
_ABORTED = (
    "this process was killed, most likely because process 0 of this run was lost: check the output "
    f"of process 0; {_RESUMES}"
)
# Messages of collectives when a process is lost.
_PEER_LOST = re.compile(
    "Gloo|NCCL|by peer|onnection (closed|reset)|UNAVAILABLE|DEADLINE_EXCEEDED|oordination service"
)


class Watchdog:
    """Inside `with`, ends this process with a message and `EXIT_PEER_LOST` when the run is stuck.

    That is when another process sent no heartbeat for `mesh.heartbeat_timeout` seconds or ended on
    an error, or when `beat` was not called here for `mesh.step_timeout` seconds.
    """

    def __init__(self, settings: MeshSettings):
        self._heartbeat_timeout, self._step_timeout = (
            settings.heartbeat_timeout,
            settings.step_timeout,
        )
        self._interval = min(2.0, settings.heartbeat_timeout / 10)
        self._stopped = threading.Event()
        self._peer_error = ""  # the error of another process
        group = process_group()
        self._client, self._process = group.client, group.process_id
        self.beat()
        others = set(range(group.num_processes)) - {self._process}
        self._last_seen = dict.fromkeys(sorted(others), self._last_beat)
        self._shell: subprocess.Popen[bytes] | None = None

    def beat(self) -> None:
        """Restarts the step timeout: work has continued."""
        self._last_beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._last_seen:
            self._shell = subprocess.Popen(
                ["sh", "-c", 'read -r _ || echo "error: $0" >&2', _ABORTED],
                stdin=subprocess.PIPE,
                start_new_session=True,  # it outlives a signal to this process's group
            )
            threading.Thread(target=self._exchange_heartbeats, daemon=True, name="watch").start()
        threading.Thread(target=self._check_timeouts, daemon=True, name="watch").start()
        return self

    def __exit__(
        self,
        _: type[BaseException] | None,
        error: BaseException | None,
        __: TracebackType | None,
    ) -> None:
        if self._shell is None:
            self._stopped.set()
            return
        known = explain(error) if isinstance(error, Exception) else None
        if error is not None and known is None and _PEER_LOST.search(str(error)):
            time.sleep(3 * self._interval)  # `_check_timeouts` may have the other's own message
            self._exit(f"another process was lost ({error_line(error, 160)}): {_RESUMES}")
        self._stopped.set()
        message = ""
        if error is not None:
            message = known or f"{type(error).__name__}: {error}"
        if self._client is not None:
            with suppress(jax.errors.JaxRuntimeError):
                key = f"{_EXIT}{self._process}"
                self._client.key_value_set(key, message, allow_overwrite=True)
        if message:
            self._wait_for_readers()
        self._stop_shell()

    def _exchange_heartbeats(self) -> None:
        """Publishes this process's heartbeat, and reads those and the exits of the others."""
        last: dict[int, str] = {}
        count = 0
        while self._client is not None and not self._stopped.wait(self._interval):
            count += 1
            with suppress(jax.errors.JaxRuntimeError):
                key = f"{_HEARTBEAT}{self._process}"
                self._client.key_value_set(key, str(count), allow_overwrite=True)
                for process, value in _by_process(self._client, _HEARTBEAT).items():
                    if process in self._last_seen and value != last.get(process):
                        last[process], self._last_seen[process] = value, time.monotonic()
                for process, message in _by_process(self._client, _EXIT).items():
                    if message:
                        self._peer_error = f"process {process} ended ({message.rstrip('.')})"
                    self._last_seen.pop(process, None)

    def _check_timeouts(self) -> None:
        """Ends the process after a timeout or an error of another process."""
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            if self._peer_error:
                self._exit(f"{self._peer_error}, so this one ends too: fix that; {_RESUMES}")
            for process, seen in list(self._last_seen.items()):
                if now - seen > self._heartbeat_timeout:
                    self._exit(
                        f"process {process} of this run sent no heartbeat for "
                        f"{self._heartbeat_timeout} s: check the output of that process; {_RESUMES}"
                    )
            if self._step_timeout and now - self._last_beat > self._step_timeout:
                self._exit(
                    f"no progress for {self._step_timeout} s: check the output of the other "
                    f"processes, or raise mesh.step_timeout; {_RESUMES}"
                )

    def _exit(self, message: str) -> None:
        """Ends the process at once: its main thread may be blocked forever."""
        print(f"error: {message}", file=sys.stderr, flush=True)
        self._wait_for_readers()
        self._stop_shell()  # last: JAX may abort the process at any time
        exit_now(EXIT_PEER_LOST)

    def _wait_for_readers(self) -> None:
        """In process 0, gives the others time to read its message: the service ends with it."""
        if self._process == 0 and self._shell is not None:
            time.sleep(3 * self._interval)

    def _stop_shell(self) -> None:
        if self._shell is not None:
            with suppress(OSError):
                self._shell.communicate(b"\n")


def _by_process(client: KeyValueClient, prefix: str) -> dict[int, str]:
    """The values of the keys `prefix + process`, by process."""
    return {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(prefix)}
