"""Errors that a user can cause: one sentence with the cause and the next thing to try."""

import errno
import io
import multiprocessing
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from absl import logging as absl_logging

from spatial_ssrl_jax.common.text import error_line, one_line, printable

EXIT_INTERRUPTED = 130  # exit code after Ctrl-C
EXIT_PEER_LOST = 75  # exit code after another process of the run was lost; a retry may help

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_OS_ERROR = re.compile(r"os[ _]error(?:_code=')? ?(\d+)")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class UserError(Exception):
    """Something the user can fix. The message is one sentence that names the thing."""


class BadImage(UserError):
    """One image or depth map that cannot be used; a pipeline skips, counts and names it."""


@contextmanager
def explain_write_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an error of writing to a run's folder into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        failure = write_failure(error)
        if failure is None or (isinstance(error, OSError) and error.errno not in (None, *_DISK)):
            raise
        why, fix = failure
        place = getattr(error, "filename", None) or folder
        raise UserError(
            f"{place} cannot be written ({why}): {fix}; the same command then resumes after the "
            "newest checkpoint."
        ) from error


def disk_problem(error: Exception) -> str | None:
    """Why a disk takes no more (full, quota, read-only); None where the error is of another kind.

    Writers in other languages, such as those of safetensors and TensorStore, raise errors of their
    own that hold the number of the system's error in their text.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR.search(str(error))):
        number = int(found[1])
    return os.strerror(number) if number in _DISK else None


def write_failure(error: Exception) -> tuple[str, str] | None:
    """Why a file could not be written and how to fix it; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno), "free space there"
    if problem := disk_problem(error):
        return problem, "free space there"
    return bucket_error(error)


_CLOUD = ("gcsfs", "aiohttp", "fsspec", "google.api_core", "google.auth", "google.cloud")
GRANT_HINT = (
    "grant roles/storage.objectAdmin and roles/storage.legacyBucketReader on the bucket to the "
    "account that the machine acts as"
)


def bucket_error(error: Exception) -> tuple[str, str] | None:
    """Why a bucket cannot be used and how to fix it; None where the error is not about one."""
    text, from_client = one_line(error), type(error).__module__.startswith(_CLOUD)
    code = getattr(error, "code", None) if from_client else _http_status(error)
    if code is None and not from_client:
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
    return error_line(error), "check the network and the bucket, and try again"


def _http_status(error: Exception) -> int | None:
    """The HTTP status that a message of TensorStore or an OSError of gcsfs holds."""
    text = one_line(error)
    status = re.search(r"http_response_code='(\d+)'", text)
    if status:
        return int(status[1])
    if isinstance(error, OSError) and error.errno is None:
        if text.startswith("Forbidden: "):
            return 403
        if isinstance(error, FileNotFoundError) and re.match(r"(https?:/|b)/\S+$", text):
            return 404
    return None


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command's `main(argv)` and exits.

    The exit code is that of `main` or 0; 2, with one sentence, after an error that the user can
    fix; 130, at once, after Ctrl-C.

    `--debug` anywhere on the command line shows the traceback as well.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may be no Unicode
    argv = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(argv) != len(sys.argv) - 1
    code = 0
    if not debug:
        # Orbax logs the tracebacks of errors that it then raises.
        absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        with _interruptible_imports():
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


@contextmanager
def _interruptible_imports() -> Iterator[None]:
    """Lets Ctrl-C end the process at once while libraries are imported.

    A `KeyboardInterrupt` is lost there in JAX's callbacks of the garbage collector, or ends the
    initialisation of a compiled module with a traceback of its own.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith("<frozen importlib") or code.co_name in _CALLBACKS:
                print("stopped", file=sys.stderr)
                exit_now(EXIT_INTERRUPTED)
            frame = frame.f_back
        signal.default_int_handler(number, None)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # a shell's background job, or a caller with a handler of its own
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


_CALLBACKS = ("_xla_gc_callback",)


def explain(error: Exception) -> str | None:
    """One sentence, on one line, about an error that a user can fix; None for any other."""
    if isinstance(error, UserError):
        text = str(error)
    elif isinstance(error, OSError) and error.errno is not None:
        text = _file_error(error, error.errno)
    elif problem := disk_problem(error):
        text = f"a file cannot be written ({problem}): free space there, or choose another folder"
    elif failure := bucket_error(error):
        text = "the bucket cannot be used ({}): {}".format(*failure)
    elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        text = (
            f"memory ran out ({error_line(error)}): lower a batch size (micro_batch_rows, "
            "rollout.batch_prompts, eval.batch_prompts, --prompts), or use more devices"
        )
    else:
        return None
    text = printable(one_line(text))
    return text if text.endswith((".", "?")) else text + "."


def _file_error(error: OSError, number: int) -> str:
    where = f"{error.filename2 or error.filename}: " if error.filename else ""
    what = where + os.strerror(number)
    if number in _NO_SPACE:
        return f"{what}: free space there, or choose another folder to write."
    if number in _NO_PLACE:
        return f"{what}: choose another folder, or fix its permissions."
    return f"{what}: check that it is there and can be read, then run the same command again."


def exit_now(code: int) -> None:
    """Ends the process and its workers without waiting for its threads."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
