"""Watching the processes of a run: where one is lost, ends on an error or hangs, all of them end.

Two threads a process: one tells the others that it lives and hears from them, through the service
that joined them; one looks at the clock, for the first may itself be kept waiting. The service
is in process 0, and the library aborts the others when it goes: a shell left after says why.
"""

import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import jax
from jax._src import distributed  # the only way to the service's shared notes

from spatial_ssrl_jax.common.errors import EXIT_PEER_LOST, exit_now, explain
from spatial_ssrl_jax.config.schema import MeshSettings

_ALIVE, _LEFT = "watch/alive/", "watch/left/"
_GOES_ON = "the same command resumes after the newest checkpoint."
_ABORTED = (
    "this process was ended from outside, most likely because process 0 of this run was lost: see "
    f"what became of it; {_GOES_ON}"
)
# What collectives say when one of those who take part is gone.
_BROKEN_OFF = re.compile(
    "Gloo|NCCL|by peer|onnection (closed|reset)|UNAVAILABLE|DEADLINE_EXCEEDED|oordination service"
)


class Watchdog:
    """Inside `with`, ends this process with a sentence and the code `EXIT_PEER_LOST` when it waits in vain.

    That is: another process was not heard of for `mesh.heartbeat_timeout` seconds, or ended on an error, or
    nothing continued here for `mesh.step_timeout` seconds.
    """

    def __init__(self, settings: MeshSettings):
        self._silence, self._patience = settings.heartbeat_timeout, settings.step_timeout
        self._pause = min(2.0, settings.heartbeat_timeout / 10)
        self._over = threading.Event()
        self._wrong = ""  # what the other processes say of themselves
        state = distributed.global_state
        self._client: Any = state.client
        self._process = state.process_id
        self.beat()
        others = set(range(state.num_processes if state.client else 1)) - {self._process}
        self._heard = dict.fromkeys(sorted(others), self._beaten)
        self._shell: subprocess.Popen | None = None

    def beat(self) -> None:
        """Notes that work continued."""
        self._beaten = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._heard:
            self._shell = subprocess.Popen(
                ["sh", "-c", 'read -r _ || echo "error: $0" >&2', _ABORTED],
                stdin=subprocess.PIPE,
                start_new_session=True,  # it outlives a signal to all of this process's group
            )
        for work in (self._talk, self._look) if self._heard else (self._look,):
            threading.Thread(target=work, daemon=True, name="watch").start()
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if self._shell is None:
            self._over.set()
            return
        known = explain(error) if isinstance(error, Exception) else None
        if known is None and _BROKEN_OFF.search(str(error)):
            time.sleep(3 * self._pause)  # `_look` knows more where the other one left word
            said = " ".join(str(error).split())[:160]
            self._leave(f"another process was lost ({said}): {_GOES_ON}")
        self._over.set()
        sentence = ""
        if error is not None:
            sentence = known or f"{type(error).__name__}: {error}"
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_LEFT}{self._process}", sentence, allow_overwrite=True)
        if sentence:
            self._linger()
        self._dismiss_shell()

    def _talk(self) -> None:
        """Says that this process lives, and notes what is new from the others."""
        last: dict[int, str] = {}
        count = 0
        while not self._over.wait(self._pause):
            count += 1
            with suppress(jax.errors.JaxRuntimeError):
                mine = f"{_ALIVE}{self._process}"
                self._client.key_value_set(mine, str(count), allow_overwrite=True)
                for process, said in self._notes(_ALIVE).items():
                    if process in self._heard and said != last.get(process):
                        last[process], self._heard[process] = said, time.monotonic()
                for process, said in self._notes(_LEFT).items():
                    if said:
                        self._wrong = f"process {process} ended ({said.rstrip('.')})"
                    self._heard.pop(process, None)

    def _notes(self, folder: str) -> dict[int, str]:
        found = self._client.key_value_dir_get(folder)
        return {int(key.rpartition("/")[2]): said for key, said in found}

    def _look(self) -> None:
        """Ends the process when it is time."""
        while not self._over.wait(self._pause):
            now = time.monotonic()
            if self._wrong:
                self._leave(f"{self._wrong}, so this one does too: fix that; {_GOES_ON}")
            for process, heard in list(self._heard.items()):
                if now - heard > self._silence:
                    self._leave(
                        f"process {process} of this run was not heard of for {self._silence} s: "
                        f"see what became of it; {_GOES_ON}"
                    )
            if self._patience and now - self._beaten > self._patience:
                self._leave(
                    f"nothing continued for {self._patience} s: see what the other processes say, or "
                    f"raise mesh.step_timeout; {_GOES_ON}"
                )

    def _leave(self, sentence: str) -> None:
        """Ends the process at once: its main thread may never come back."""
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        self._linger()
        self._dismiss_shell()  # only now: the library may abort at any time
        exit_now(EXIT_PEER_LOST)

    def _linger(self) -> None:
        """Process 0 takes the service along with it, so the others first read what it says."""
        if self._process == 0 and self._shell is not None:
            time.sleep(3 * self._pause)

    def _dismiss_shell(self) -> None:
        if self._shell is not None:
            with suppress(OSError):
                self._shell.communicate(b"\n")
