"""Errors that a user can cause: one sentence with the cause and the next thing to try."""

import errno
import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

EXIT_INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
EXIT_PEER_LOST = (
    75  # that of one that ended with the other processes of its run; trying again may help
)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class UserError(Exception):
    """Something the user can fix. The message is one sentence that names the thing."""


class BadImage(UserError):
    """One image or depth map that cannot be used; a pipeline skips, counts and names it."""


@contextmanager
def disk_explained(folder: str | os.PathLike) -> Iterator[None]:
    """Says in a sentence that a run's folder cannot be written to any more."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why, mend = write_failure(error)
        if why is None or (isinstance(error, OSError) and error.errno not in (None, *_DISK)):
            raise
        place = getattr(error, "filename", None) or folder
        raise UserError(
            f"{place} cannot be written ({why}): {mend}; the same command then resumes after the "
            "newest checkpoint."
        ) from error


def write_failure(error: Exception) -> tuple[str, str] | tuple[None, None]:
    """Why a file could not be written and what to do, or None where that is not what happened."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror, "free space there"
    return bucket_error(error) or (None, None)


_CLOUD = ("gcsfs", "aiohttp", "fsspec", "google.api_core", "google.auth", "google.cloud")
GRANT_HINT = (
    "grant roles/storage.objectAdmin and roles/storage.legacyBucketReader on the bucket to the "
    "account that the machine acts as"
)


def bucket_error(error: Exception) -> tuple[str, str] | None:
    """Why a bucket cannot be used and what to do; None where the error is not about one."""
    text, ours = _line(error), type(error).__module__.startswith(_CLOUD)
    code = getattr(error, "code", None) if ours else _answered(error)
    if code is None and not ours:
        return None
    if code == 401 or type(error).__name__ == "DefaultCredentialsError":
        return "no valid credentials", (
            "run gcloud auth application-default login, or give the machine a service account"
        )
    if code == 403:
        refused = re.search(r"\S+ does not have \S+ access", text)
        return refused[0] if refused else "permission denied", GRANT_HINT
    if code == 404:
        return "there is no such bucket or file", "check the name, or create the bucket"
    return text[:200].rstrip("."), "check the network and the bucket, and try again"


def _answered(error: Exception) -> int | None:
    """The cloud's answer where it is hidden: in what TensorStore says, and in gcsfs's OSErrors."""
    text = _line(error)
    noted = re.search(r"http_response_code='(\d+)'", text)
    if noted:
        return int(noted[1])
    if isinstance(error, OSError) and error.errno is None:
        if text.startswith("Forbidden: "):
            return 403
        if isinstance(error, FileNotFoundError) and re.match(r"(https?:/|b)/\S+$", text):
            return 404
    return None


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command's `main(argv)` and exits: 0 when done, 2 with one sentence on an error that
    the user can fix, 130 at once when Ctrl-C ends it.

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
        exit_now(EXIT_INTERRUPTED)
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
    """One sentence, on one line, about an error that a user can fix; None for any other."""
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, OSError) and error.errno is not None:
        text = _about_files(error)
    elif bucket_error(error):
        text = "the bucket cannot be used ({}): {}".format(*bucket_error(error))
    elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        text = (
            f"memory ran out ({_line(error)[:200]}): make less at a time (micro_batch_prompts, "
            "rollout.batch_prompts, eval.batch_prompts, --prompts), or use more devices"
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
        return f"{what}: choose another folder, or fix its permissions."
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
