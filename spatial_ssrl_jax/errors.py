"""Errors that a user can cause: one sentence with the cause and the next thing to try."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class UserError(Exception):
    """Something the user can mend. The message is one sentence that names the thing."""


class BadPicture(UserError):
    """One picture or depth map that cannot be used; a pipeline skips, counts and names it."""


@contextmanager
def disk_explained(folder: str | os.PathLike) -> Iterator[None]:
    """Says in a sentence that a run's folder cannot be written to any more."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise UserError(
            f"{error.filename or folder} cannot be written ({error.strerror}): free space there; "
            "the same command then goes on after the newest checkpoint."
        ) from error


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command's `main(argv)` and exits: 0 when done, 2 with one sentence on a `UserError`.

    `--debug` anywhere on the command line shows the traceback as well.
    """
    argv = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(argv) != len(sys.argv) - 1
    try:
        code = main(argv)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code or 0)
