"""Retries for files that are unavailable: a network disk that stalls, an unmounted folder."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from spatial_ssrl_jax.common.errors import UserError

RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each retry, a minute in all
_WARN_EVERY = 10.0  # seconds: many threads meet the same error
_TRANSIENT = {  # errors of a network file system that is unavailable
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
_warned = {"at": -_WARN_EVERY}
_warning = threading.Lock()


def with_retries(read: Callable[[], Value], path: str, listed: bool = True) -> Value:
    """Calls `read`, with growing delays between retries, and returns its result.

    It retries after a transient error of a network file system, and where a listed file's folder is
    missing or empty. Any other error, such as a file missing in its folder, is raised at once.

    Args:
      read: opens and reads the file anew each time.
      path: the file.
      listed: the file was listed before, so its folder should exist.

    Raises:
      UserError: the folder is still missing after the last retry.
      OSError: the file alone is still unreadable, or the error is not transient.
    """
    for wait in RETRY_DELAYS:
        try:
            return read()
        except OSError as error:
            if not (error.errno in _TRANSIENT or (listed and _folder_is_missing(path, error))):
                raise
            _warn(
                f"{path} cannot be read ({error.strerror or error}): trying again in {wait:.0f} s"
            )
        time.sleep(wait)
    try:
        return read()
    except OSError as error:
        if not (listed and _folder_is_missing(path, error)):
            raise
        raise UserError(
            f"{os.path.dirname(path)} is missing or empty after {sum(RETRY_DELAYS):.0f} s of "
            "retries: mount it again; the same command then resumes."
        ) from error


def _folder_is_missing(path: str, error: OSError) -> bool:
    """Whether the error may be that the file's whole folder is away."""
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, *_TRANSIENT):
        return False
    return is_away(os.path.dirname(path))


def is_away(folder: str) -> bool:
    """Whether a folder is missing or empty, as after an unmount."""
    try:
        with os.scandir(folder or ".") as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _warn(text: str) -> None:
    """Logs a warning, at most one in `_WARN_EVERY` seconds over all threads of the process."""
    with _warning:
        now = time.monotonic()
        if now - _warned["at"] < _WARN_EVERY:
            return
        _warned["at"] = now
    logging.getLogger(__name__).warning(text)
