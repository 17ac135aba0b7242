"""Errors that a user can cause: one sentence with the cause and the next thing to try."""

import errno
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

STOPPED = 130  # the exit code of a program that Ctrl-C ended
LOST = 75  # that of one that ended with the other processes of its run; trying again may help
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


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
    """Runs a command's `main(argv)` and exits: 0 when done, 2 with one sentence on an error that
    the user can mend, 130 at once when Ctrl-C ends it.

    `--debug` anywhere on the command line shows the traceback as well.
    """
    argv = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(argv) != len(sys.argv) - 1
    try:
        code = main(argv) or 0
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("stopped", file=sys.stderr)
        exit_now(STOPPED)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"error: {sentence}", file=sys.stderr)
        code = 2
    sys.exit(code)


def explain(error: Exception) -> str | None:
    """One sentence, on one line, about an error that a user can mend; None for any other."""
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, OSError) and error.errno is not None:
        text = _about_files(error)
    elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        text = (
            f"memory ran out ({_line(error)[:200]}): make less at a time (micro_prompts, "
            "rollout.wave, eval.prompts, --prompts), or use more devices"
        )
    else:
        return None
    text = " ".join(text.split())
    return text if text.endswith((".", "?")) else text + "."


def _about_files(error: OSError) -> str:
    where = f"{error.filename2 or error.filename}: " if error.filename else ""
    what = where + os.strerror(error.errno)
    if error.errno in _NO_SPACE:
        return f"{what}: free space there, or choose another folder to write."
    if error.errno in _NO_PLACE:
        return f"{what}: choose another folder, or mend its permissions."
    return f"{what}: check that it is there and can be read, then run the same command again."


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def exit_now(code: int) -> None:
    """Ends the process and its workers without waiting for what its threads still do."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
