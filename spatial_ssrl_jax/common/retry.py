"""Waiting for files that are away for a while: a network disk that stalls, a folder unmounted."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from spatial_ssrl_jax.common.errors import UserError

RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each further try, a minute in all
_SAY_EVERY = 10.0  # seconds: many threads meet the same trouble
_PASSING = {  # what a network file system says while it is away
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.EREMOTEIO,
    errno.ESHUTDOWN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}

Value = TypeVar("Value")
_said = {"at": -_SAY_EVERY}
_saying = threading.Lock()


def with_retries(read: Callable[[], Value], path: str, listed: bool = True) -> Value:
    """What `read` gives, tried again with growing waits while its file may only be away.

    That is after an error of a network file system, and where a listed file's folder is gone or
    empty; any other error, a file missing in its folder for one, is raised at once.

    Args:
      read: opens and reads the file anew each time.
      path: the file.
      listed: it has been seen before, so that its folder should be there.

    Raises:
      UserError: the folder stayed away to the end of the last wait.
      OSError: the file alone stayed unreadable, or should not be waited for.
    """
    for wait in RETRY_DELAYS:
        try:
            return read()
        except OSError as error:
            if not (error.errno in _PASSING or (listed and _folder_is_away(path, error))):
                raise
            _say(f"{path} cannot be reached ({_reason(error)}): trying again in {wait:.0f} s")
        time.sleep(wait)
    try:
        return read()
    except OSError as error:
        if not (listed and _folder_is_away(path, error)):
            raise
        raise UserError(
            f"{os.path.dirname(path)} is gone or empty and was waited for {sum(RETRY_DELAYS):.0f} s: "
            "mount it again; the same command then resumes."
        ) from error


def _folder_is_away(path: str, error: OSError) -> bool:
    """Whether a file is missing because its whole folder is: unmounted, it is gone or empty."""
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, *_PASSING):
        return False
    try:
        with os.scandir(os.path.dirname(path) or ".") as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _say(text: str) -> None:
    """Warns, once in a while: sources are read in threads and in worker processes."""
    with _saying:
        now = time.monotonic()
        if now - _said["at"] < _SAY_EVERY:
            return
        _said["at"] = now
    logging.getLogger(__name__).warning(text)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
