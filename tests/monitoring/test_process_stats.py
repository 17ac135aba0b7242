"""Compilations are counted by name, and those of other threads apart."""

from threading import Thread

import jax
import numpy as np

from spatial_ssrl_jax.monitoring.process_stats import (
    CompilationCounter,
    Compiled,
    describe_programs,
)


@jax.jit
def shifted(x: jax.Array) -> jax.Array:
    return x + 3


def test_programs_are_counted_by_name_and_those_waited_for_apart():
    counter = CompilationCounter()
    shifted(np.ones(3))
    assert counter.waited.count == counter.count(["shifted", "never"]) == 1
    assert counter.waited.seconds > 0 and counter.waited.read == 0
    thread = Thread(target=lambda: shifted(np.ones(4)))
    thread.start()
    thread.join()
    assert counter.waited.count == 1 and counter.count(["shifted"]) == 2
    jax.clear_caches()
    shifted(np.ones(3))
    assert counter.waited.read == counter.programs["shifted"].read == 1  # the session's cache


def test_a_step_names_its_slow_programs():
    before = {"prefill": Compiled(1, 0, 9.0), "add": Compiled(4, 0, 0.1)}
    now = {"prefill": Compiled(3, 1, 10.8), "add": Compiled(7, 0, 0.2), "apply": Compiled(1, 0, 4)}
    assert describe_programs(now, before) == (
        "apply (4.0 s), prefill (2 in 1.8 s), 3 others; 1 were read from the cache"
    )
    assert describe_programs({"add": Compiled(2)}, {}) == "2 small ones"
