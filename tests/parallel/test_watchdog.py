"""A process that is lost, stops, fails or hangs ends the others, in time."""

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

HEARTBEAT, STEP = 5, 12  # timeouts in seconds
SLACK = 10  # seconds that a busy machine may add


def work(argv: list[str]) -> None:
    """What a process does: sums over all of them, step by step, and fails or hangs if told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fails")
    parser.add_argument("--hangs")
    add_options(parser)
    args = parser.parse_args(argv)
    settings = MeshSettings(heartbeat_timeout=HEARTBEAT, step_timeout=STEP)
    connect(args, settings.heartbeat_timeout)
    with Watchdog(settings) as watch:
        for step in range(10_000):
            assert all_sum(1) == 2
            watch.beat()
            print("step", flush=True)
            if step == 3 and args.fails == str(args.process):
                raise UserError("the disk is full: free space there.")
            while step == 3 and args.hangs == str(args.process):
                time.sleep(0.1)
            time.sleep(0.05)


CHILD = (
    "from tests.parallel.test_watchdog import work; "
    "from spatial_ssrl_jax.common.errors import run_command; run_command(work)"
)


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[list[subprocess.Popen]]:
    """Two processes that have begun to work."""
    processes = start_all(["-c", CHILD, *getattr(request, "param", [])], 2)
    for process in processes:
        until(process, "step")
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen, seconds: float) -> tuple[int, str]:
    """Exit code and message of a process that ends in time."""
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
    code, message = ended(pair[1 - lost], HEARTBEAT)
    gone = number == signal.SIGKILL and lost == 0  # process 0 hosts the service
    assert code == EXIT_PEER_LOST or (gone and code == -signal.SIGABRT)
    assert re.search(
        rf"process {lost} of this run (was lost|sent no heartbeat)|process was lost", message
    )
    assert "the same command resumes" in message


@pytest.mark.parametrize(
    "pair", [["--fails=1"], pytest.param(["--fails=0"], marks=pytest.mark.slow)], indirect=True
)
def test_the_others_name_the_error_of_one(pair: list[subprocess.Popen]):
    found = [ended(process, HEARTBEAT) for process in pair]
    assert (2, "error: the disk is full: free space there.") in found
    (other,) = (message for code, message in found if code == EXIT_PEER_LOST)
    assert "ended (the disk is full: free space there), so this one ends too" in other


@pytest.mark.parametrize("pair", [["--hangs=1"]], indirect=True)
def test_one_that_hangs_ends_both(pair: list[subprocess.Popen]):
    for process in pair:
        code, message = ended(process, STEP)
        assert code == EXIT_PEER_LOST and (
            "no progress for 12 s" in message or "was lost" in message
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
