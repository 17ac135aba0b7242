"""Signals: the first one is noted, a second Ctrl-C ends at once, and the old handlers come back."""

import os
import signal
import subprocess
import sys

import pytest

from spatial_ssrl_jax.trainer.preemption import STOPPING, Preemption

LOOP = """
import sys, time
from spatial_ssrl_jax.trainer.preemption import Preemption
with Preemption() as preemption:
    print("ready", flush=True)
    while not (preemption.requested and "stubborn" not in sys.argv):
        time.sleep(0.01)
        if preemption.requested and "stubborn" in sys.argv:
            print("heard", flush=True)
            time.sleep(20)
print("saved", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_is_noted_and_not_died_of(number: int):
    with Preemption() as preemption:
        assert not preemption.requested
        os.kill(os.getpid(), number)
        assert preemption.requested


def test_the_first_signal_is_answered_at_once_and_once():
    messages = []
    with Preemption() as preemption:
        preemption.say = messages.append
        os.kill(os.getpid(), signal.SIGTERM)
        assert messages == [STOPPING] and "Ctrl-C again" in STOPPING
        os.kill(os.getpid(), signal.SIGTERM)
        assert messages == [STOPPING]


def test_sigterm_twice_is_still_only_a_request():
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_on_top_of_a_request_ends_at_once(first: int):
    with pytest.raises(KeyboardInterrupt), Preemption():
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_old_handlers_come_back():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with Preemption():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def start(*words: str) -> subprocess.Popen:
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    return child


def test_a_process_that_is_sent_sigterm_finishes_its_work_and_exits_0():
    child = start()
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=20)
    assert (out, child.returncode) == ("saved\n", 0)


def test_a_process_that_hangs_is_ended_by_a_second_ctrl_c():
    child = start("stubborn")
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "heard\n"
    child.send_signal(signal.SIGINT)
    out, error = child.communicate(timeout=10)
    assert out == "" and child.returncode != 0 and "KeyboardInterrupt" in error
