"""A lock on a folder that one process writes, so that a second run cannot damage the first."""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from etils import epath

from spatial_ssrl_jax.common.errors import UserError, exit_now
from spatial_ssrl_jax.common.paths import LOCK, in_bucket
from spatial_ssrl_jax.common.text import printable

_NOT_SUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
RENEWED_SECONDS = 20  # between writes of a bucket's lock
STALE_SECONDS = 70  # without one, after which its run counts as dead
_HERE_SECONDS = 5  # for a process on this machine to end
_THERE_SECONDS = 120  # for a server of files to notice that another machine is gone


@contextmanager
def locked(folder: epath.PathLike, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a folder's lock; it is released by the end of the process too, however it ends.

    On a local disk, and on NFS where it has locks, the system holds the lock (`flock`). A bucket
    has none: there an object is renewed while its run lives, and a second run waits to see whether
    it is; two runs that start within the same second are not told apart.

    Args:
      folder: exists.
      say: called with a message when it waits.

    Raises:
      UserError: another process holds it.
    """
    if in_bucket(folder):
        with _locked_in_bucket(epath.Path(folder) / LOCK, say):
            yield
        return
    with _open_locked(Path(folder), say) as file:
        file.truncate(0)
        file.write(_owner())
        file.flush()
        try:
            yield
        finally:
            (Path(folder) / LOCK).unlink(missing_ok=True)


def check_unlocked(folder: epath.PathLike) -> None:
    """Checks that no process on this machine's file systems holds a folder's lock; writes nothing.

    Raises:
      UserError: another process holds it.
    """
    path = None if in_bucket(folder) else Path(folder) / LOCK
    if path is None or not path.is_file() or not os.access(path, os.R_OK | os.W_OK):
        return
    with open(path, "r+", encoding="utf-8") as file:
        if not _lock(file):
            raise UserError(_in_use(folder, file.read()))


def _open_locked(folder: Path, say: Callable[[str], None]) -> IO[str]:
    """Opens and locks a folder's file, as soon as a process that is ending has released it."""
    begun, said = time.monotonic(), False
    while True:
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - open while it is held
        if _lock(file):
            if _is_at(file, folder / LOCK):
                return file
            file.close()  # its process has removed it since it was opened
            continue
        file.seek(0)
        content = file.read()
        file.close()
        here = _field(content, "host") == socket.gethostname()
        if time.monotonic() - begun > (_HERE_SECONDS if here else _THERE_SECONDS):
            raise UserError(_in_use(folder, content))
        if not here and not said:
            say(f"{_in_use(folder, content)} Waiting for up to {_THERE_SECONDS} s.")
            said = True
        time.sleep(0.5)


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _field(content: str, name: str) -> str | None:
    try:
        return str(json.loads(content)[name])
    except (ValueError, KeyError, TypeError):
        return None


def _lock(file: IO[str]) -> bool:
    """Locks an open file until it is closed; False when another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in _NOT_SUPPORTED:
            raise
    return True


def _owner() -> str:
    return json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": time.ctime()})


def _in_use(folder: epath.PathLike, content: str) -> str:
    process, host, since = (_field(content, name) for name in ("process", "host", "since"))
    who = printable(f"process {process} on {host}, since {since}") if host else "another process"
    return f"{folder} is in use ({who}): wait for it to end, or choose another folder."


@contextmanager
def _locked_in_bucket(path: epath.Path, say: Callable[[str], None]) -> Iterator[None]:
    mine = json.dumps(json.loads(_owner()) | {"id": uuid.uuid4().hex})
    before = _read(path)
    if before is not None:
        say(f"{path} is there: waiting {STALE_SECONDS} s to see whether its run lives")
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1, STALE_SECONDS / 5))
            now = _read(path)
            if now is None:
                break
            if now != before:
                raise UserError(_in_use(path.parent, now))
    released = threading.Event()

    def is_mine() -> bool:
        return _field(_read(path) or mine, "id") == _field(mine, "id")

    def renew() -> None:
        number = 0
        while not released.wait(RENEWED_SECONDS):
            with suppress(Exception):  # the next renewal may succeed
                if not is_mine():
                    print(
                        f"error: {path} was taken over by another run, since this one did not "
                        "renew it in time: let one of them run alone.",
                        file=sys.stderr,
                    )
                    exit_now(2)
                path.write_text(json.dumps(json.loads(mine) | {"renewed": number}))
            number += 1

    path.write_text(mine)
    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        released.set()
        thread.join()
        with suppress(Exception):  # a lock that stays counts as dead after a while
            if is_mine():
                path.unlink()


def _read(path: epath.Path) -> str | None:
    """The lock's content; None where there is none."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
