"""Reads damaged files of every kind, as the commands do: each ends well or with a sentence.

    python -m tests.helpers.fuzz --count=20            # of each kind of input; prints the table
    python -m tests.helpers.fuzz --only=config.json --case=7   # one case, with its traceback

Anything else than success or an error that `common.errors.explain` has a sentence for is a fault: a
traceback, a hang, or memory that runs out.
"""

import argparse
import contextlib
import dataclasses
import io
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from spatial_ssrl_jax.common.errors import explain
from tests.helpers import corruptions
from tests.helpers.fuzz_inputs import Input, every_input

SECONDS = 15  # of a case, after which it hangs
MEMORY = 3 << 30  # bytes that a case may add to the process's address space
_PLACE_SHARE = 0.08  # of the cases put something else in the file's place

ACCEPTED, SENTENCE, TRACEBACK, HANG, MEMORY_OUT = (
    "accepted", "sentence", "traceback", "hang", "memory"
)  # fmt: skip
OUTCOMES = (ACCEPTED, SENTENCE, TRACEBACK, HANG, MEMORY_OUT)


class Hang(BaseException):
    """A case that takes too long; no `except Exception` catches it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One damaged file and what reading it gave.

    Attributes:
      input: the kind of input.
      number: of the case; with the seed it makes the same damage again.
      damage: what was done to which file.
      outcome: one of `OUTCOMES`.
      text: the sentence, or where the traceback ends.
      seconds: that it took.
      memory: bytes that the process held at most, beyond those before.
    """

    input: str
    number: int
    damage: str
    outcome: str
    text: str
    seconds: float
    memory: int


def fuzz(inputs: list[Input], count: int, seed: int, only: int | None = None) -> Iterator[Case]:
    """Damages each input `count` times; `only` is the one case of each that is run."""
    with tempfile.TemporaryDirectory() as place:
        for kind in inputs:
            good = Path(place) / "good" / "data"
            good.mkdir(parents=True)
            with _quiet():
                kind.write(good)
            if not only:
                assert (fault := _outcome(kind, _copied(good)))[0] == ACCEPTED, (kind.name, fault)
            for number in range(1, count + 1) if only is None else [only]:
                yield _case(kind, good, number, Random(f"{seed} {kind.name} {number}"))
            shutil.rmtree(good.parent)


def _copied(good: Path) -> Path:
    folder = good.parent.parent / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder, symlinks=True)
    return folder


def _case(kind: Input, good: Path, number: int, rng: Random) -> Case:
    folder = _copied(good)
    files = sorted(path for path in folder.glob(kind.files) if path.is_file())
    path = rng.choice(files)
    replace = rng.random() < _PLACE_SHARE and kind.is_file
    damage = corruptions.place if replace else kind.corrupt
    label, new = damage(rng, path.read_bytes())
    path.unlink()
    if isinstance(new, bytes):
        path.write_bytes(new)
    else:
        new(path)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    held, begun = _status("VmRSS"), time.perf_counter()
    outcome, text = _outcome(kind, folder)
    seconds, memory = time.perf_counter() - begun, _status("VmHWM") - held
    name = str(path.relative_to(folder))
    return Case(kind.name, number, f"{name}: {label}", outcome, text, seconds, memory)


def _outcome(kind: Input, folder: Path) -> tuple[str, str]:
    try:
        with _quiet(), _limited(folder):
            kind.read(folder)
    except Hang as error:
        return HANG, _last_lines(error)
    except MemoryError as error:
        return MEMORY_OUT, _last_lines(error)
    except (Exception, SystemExit) as error:
        sentence = explain(error) if isinstance(error, Exception) else None
        if sentence is None:
            return TRACEBACK, _last_lines(error)
        return SENTENCE, sentence.replace(str(folder), "DIR")
    return ACCEPTED, ""


def _last_lines(error: BaseException) -> str:
    """Where a traceback ends: the deepest line of this package, and the error."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "spatial_ssrl_jax/" in f.filename] or list(frames)
    name = ours[-1].filename.rpartition("spatial_ssrl_jax/")[2]
    return f"{name}:{ours[-1].lineno} {type(error).__name__}: {str(error)[:150]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _limited(folder: Path) -> Iterator[None]:
    """Ends what takes too long, and refuses more memory than a case may take."""

    def stop(*_) -> None:
        raise Hang

    # A reader in another language, or in a thread, is let go by a process that opens the pipe.
    openers = [
        subprocess.Popen(["sh", "-c", f'sleep {SECONDS + 1}; : <> "$0"', str(path)])
        for path in folder.rglob("*")
        if path.is_fifo()
    ]
    before, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
        for opener in openers:
            opener.kill()
            opener.wait()


def _status(name: str) -> int:
    """Bytes of the process: VmSize of its address space, VmRSS in memory, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def table(cases: list[Case]) -> str:
    """Kind by outcome, in Markdown."""
    counts: dict[str, Counter[str]] = {}
    for case in cases:
        for name in (case.input, "all"):
            counts.setdefault(name, Counter())[case.outcome] += 1
    counts["all"] = counts.pop("all")
    lines = [f"| input | cases | {' | '.join(OUTCOMES)} |", "|---" * (len(OUTCOMES) + 2) + "|"]
    for name, found in counts.items():
        cells = [name, str(found.total()), *(str(found[outcome]) for outcome in OUTCOMES)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="cases of each kind of input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the names of the inputs")
    parser.add_argument("--case", type=int, help="one case, with its traceback")
    parser.add_argument("--sentences", action="store_true", help="print every case")
    args = parser.parse_args()
    inputs = [kind for kind in every_input() if args.only in kind.name]
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="backslashreplace")
    cases = []
    for case in fuzz(inputs, args.count, args.seed, args.case):
        cases.append(case)
        if args.sentences or args.case or case.outcome not in (ACCEPTED, SENTENCE):
            print(f"{case.input} {case.number}: {case.damage} -> {case.outcome} {case.text}")
            sys.stdout.flush()
    print(table(cases))
    slow, large = (max(cases, key=lambda case: getattr(case, key)) for key in ("seconds", "memory"))
    print(f"slowest: {slow.seconds:.1f} s, {slow.input} {slow.number}: {slow.damage}")
    print(f"largest: {large.memory / 1e6:.0f} MB, {large.input} {large.number}: {large.damage}")


if __name__ == "__main__":
    main()
