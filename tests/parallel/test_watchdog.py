"""A process that dies, stops answering, ends on an error or hangs ends the others, in time."""

import argparse
import re
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from spatial_ssrl_jax.common.errors import EXIT_PEER_LOST, UserError
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.parallel.collectives import all_sum
from spatial_ssrl_jax.parallel.distributed import add_options, connect
from spatial_ssrl_jax.parallel.watchdog import Watchdog
from tests.helpers.processes import start_all, until

SILENCE, PATIENCE = 5, 12
SLACK = 10  # seconds that this machine may be busy with something else


def work(argv: list[str]) -> None:
    """What a process does: sums over all of them again and again, and perhaps gets stuck."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fails")
    parser.add_argument("--hangs")
    add_options(parser)
    args = parser.parse_args(argv)
    settings = MeshSettings(heartbeat_timeout=SILENCE, step_timeout=PATIENCE)
    connect(args, settings.heartbeat_timeout)
    with Watchdog(settings) as watch:
        for turn in range(10_000):
            assert all_sum(1) == 2
            watch.beat()
            print("turn", flush=True)
            if turn == 3 and args.fails == str(args.process):
                raise UserError("the disk is full: free space there.")
            while turn == 3 and args.hangs == str(args.process):
                time.sleep(0.1)
            time.sleep(0.05)


CHILD = "from tests.parallel.test_watchdog import work; from spatial_ssrl_jax.common.errors import run_command; "
CHILD += "run_command(work)"


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[list[subprocess.Popen]]:
    """Two processes in the midst of their work."""
    processes = start_all(["-c", CHILD, *getattr(request, "param", [])], 2)
    for process in processes:
        until(process, "turn")
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen, seconds: float) -> tuple[int, str]:
    """Exit code and the sentence of a process that ends in time."""
    begun = time.monotonic()
    _, errors = process.communicate(timeout=seconds + SLACK)
    print(f"measured: ended after {time.monotonic() - begun:.1f} s with {process.returncode}")
    found = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert found, errors
    return process.returncode, found[0]


@pytest.mark.parametrize(
    ("number", "lost"),
    [
        (signal.SIGKILL, 0),
        (signal.SIGSTOP, 1),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
    ],
    ids=["0 killed", "1 stopped", "1 killed", "0 stopped"],
)
def test_a_lost_process_ends_the_other(pair: list[subprocess.Popen], number: int, lost: int):
    pair[lost].send_signal(number)
    code, said = ended(pair[1 - lost], SILENCE)
    gone = number == signal.SIGKILL and lost == 0  # with process 0 goes what joins them
    assert code == EXIT_PEER_LOST or (gone and code == -signal.SIGABRT)
    assert re.search(rf"process {lost} of this run was (lost|not heard of)|process was lost", said)
    assert "the same command resumes" in said


@pytest.mark.parametrize(
    "pair", [["--fails=1"], pytest.param(["--fails=0"], marks=pytest.mark.slow)], indirect=True
)
def test_an_error_of_one_is_what_the_other_says(pair: list[subprocess.Popen]):
    found = [ended(process, SILENCE) for process in pair]
    assert (2, "error: the disk is full: free space there.") in found
    (other,) = (said for code, said in found if code == EXIT_PEER_LOST)
    assert "ended (the disk is full: free space there), so this one does too" in other


@pytest.mark.parametrize("pair", [["--hangs=1"]], indirect=True)
def test_one_that_hangs_ends_both(pair: list[subprocess.Popen]):
    for process in pair:
        code, said = ended(process, PATIENCE)
        assert code == EXIT_PEER_LOST and (
            "nothing continued for 12 s" in said or "was lost" in said
        )


def test_a_single_process_that_hangs_ends(monkeypatch: pytest.MonkeyPatch):
    left = []
    monkeypatch.setattr("spatial_ssrl_jax.parallel.watchdog.exit_now", left.append)
    with Watchdog(MeshSettings(heartbeat_timeout=1, step_timeout=1)):
        time.sleep(2)
    assert set(left) == {EXIT_PEER_LOST}
    left.clear()
    with Watchdog(MeshSettings(heartbeat_timeout=1, step_timeout=1)) as watch:
        for _ in range(20):
            time.sleep(0.1)
            watch.beat()
    assert not left
