"""Programs that a thread compiles: each once, and no call compiles them again."""

import time
from concurrent.futures import wait
from threading import Event

import jax
import numpy as np
import pytest

from spatial_ssrl_jax.config import MeshSettings
from spatial_ssrl_jax.monitoring.process_stats import CompilationCounter
from spatial_ssrl_jax.parallel.compile_ahead import (
    CompileAhead,
    abstract,
    compile_abstract,
    compiles_ahead,
)
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout


@jax.jit
def shifted(x: jax.Array) -> jax.Array:
    return x - 5


def test_a_call_finds_what_was_compiled_ahead():
    layout = Layout(make_mesh(MeshSettings()))
    counter, ahead = CompilationCounter(), CompileAhead(enabled=True)
    batch = layout.put_batch(np.ones((4, 3), np.float32))
    expected = layout.abstract_batch(np.ones((1, 3), np.float32), 4)
    assert expected == abstract(batch)
    results = []
    ahead.add("shifted", lambda: results.append(compile_abstract(shifted, expected)))
    while not results:
        time.sleep(0.01)
    before = counter.waited.count
    assert abstract(shifted(batch)) == results[0]
    assert counter.waited.count == before and counter.count(["shifted"]) == 1
    ahead.close()


def test_a_job_is_waited_for_once_it_runs_and_left_out_before():
    ahead, running, done = CompileAhead(enabled=True), Event(), []

    def slow() -> None:
        running.set()
        time.sleep(0.3)
        done.append("slow")

    ahead.add("slow", slow)
    ahead.add("called", lambda: done.append("called"))
    assert running.wait(60)
    ahead.claim("called")
    ahead.add("called", lambda: done.append("called"))  # nothing is left to compile
    ahead.claim("slow")
    assert done == ["slow"]
    running.clear()
    ahead.add("slow again", slow)
    ahead.add("never begun", lambda: done.append("never begun"))
    assert running.wait(60)
    ahead.close()
    assert done == ["slow", "slow"]


def test_what_waits_can_be_dropped_and_queued_anew():
    ahead, running, end, done = CompileAhead(enabled=True), Event(), Event(), []
    ahead.add("runs", lambda: running.set() or end.wait(60))
    assert running.wait(60)
    for key in ("waits", "called"):
        ahead.add(key, lambda key=key: done.append(key))
    ahead.claim("called")
    ahead.drop()
    for key in ("runs", "called", "first", "waits"):  # two of them need nothing more
        ahead.add(key, lambda key=key: done.append(key))
    end.set()
    wait([ahead._jobs["waits"]], 60)
    ahead.close()
    assert done == ["first", "waits"]


def test_an_error_is_reported_once_and_a_queue_that_is_off_does_nothing():
    said, done = [], []
    ahead = CompileAhead(enabled=True, say=said.append)
    for number in range(2):
        ahead.add(number, lambda: 1 / 0)
    ahead.add("last", lambda: done.append("last"))
    while not done:
        time.sleep(0.01)
    ahead.close()
    assert len(said) == 1 and "division by zero" in said[0]
    off = CompileAhead(enabled=False)
    off.add("it", lambda: done.append("it"))
    off.claim("it")
    off.close()
    assert done == ["last"] and not off.started


def test_by_default_tpus_alone_compile_ahead(monkeypatch: pytest.MonkeyPatch):
    for backend in ("tpu", "cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert compiles_ahead("auto") == (backend == "tpu")
        assert compiles_ahead("always") and not compiles_ahead("never")
