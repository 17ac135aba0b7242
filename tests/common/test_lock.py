"""A folder's lock: one process at a time, released by any end, also in a bucket."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spatial_ssrl_jax.common import lock
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.lock import check_unlocked, locked
from spatial_ssrl_jax.common.paths import LOCK, user_path
from tests.helpers.fake_storage import Storage

HOLDER = """
import sys, time
from spatial_ssrl_jax.common.lock import locked
with locked(sys.argv[1], print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch):
    for name in ("_HERE_SECONDS", "_THERE_SECONDS"):
        monkeypatch.setattr(lock, name, 0.1)


def hold(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path, quick: None):
    holder = hold(tmp_path)
    try:
        said = rf"in use \(process {holder.pid} on .*\): wait for it to end, or choose another"
        with pytest.raises(UserError, match=said), locked(tmp_path, print):
            pass
        with pytest.raises(UserError, match=said):
            check_unlocked(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    check_unlocked(tmp_path)
    with locked(tmp_path, print):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert os.listdir(tmp_path) == []
    with locked(tmp_path, print):
        pass


def test_a_file_that_was_removed_while_it_was_opened_is_no_lock(tmp_path: Path):
    first = open(tmp_path / LOCK, "a+")  # noqa: SIM115
    (tmp_path / LOCK).unlink()
    assert not lock._is_at(first, tmp_path / LOCK)
    first.close()


def test_a_process_that_is_ending_is_waited_for(tmp_path: Path):
    holder = hold(tmp_path)
    ended = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    with locked(tmp_path, print):
        holder.communicate()
    ended.communicate()


def test_another_machine_is_waited_for_longer(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
):
    """A server of files takes a while to notice that a machine is gone."""
    holder, said = hold(tmp_path), []
    try:
        monkeypatch.setattr("socket.gethostname", lambda: "another")
        with pytest.raises(UserError, match="in use"), locked(tmp_path, said.append):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert len(said) == 1 and "Waiting" in said[0]


def test_checking_writes_nothing(tmp_path: Path):
    check_unlocked(tmp_path / "none")
    check_unlocked(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_bucket(bucket: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lock, "RENEWED_SECONDS", 0.05)
    monkeypatch.setattr(lock, "STALE_SECONDS", 1)
    folder, said = user_path("gs://bucket/run"), []
    with locked(folder, said.append):
        assert bucket.names("bucket") == [f"run/{LOCK}"]
        with pytest.raises(UserError, match=r"gs://bucket/run is in use"):
            locked(folder, said.append).__enter__()
    assert bucket.names("bucket") == [] and "waiting" in said[0]
    ended = []
    monkeypatch.setattr(lock, "exit_now", ended.append)
    with locked(folder, said.append):
        bucket.write("bucket", f"run/{LOCK}", b'{"id": "of a run that took it over"}')
        time.sleep(0.5)
    assert set(ended) == {2}
    bucket.write("bucket", f"run/{LOCK}", b"{}")  # of a run that was killed
    begun = time.monotonic()
    with locked(folder, said.append):
        assert time.monotonic() - begun > 0.9
    assert bucket.names("bucket") == []
