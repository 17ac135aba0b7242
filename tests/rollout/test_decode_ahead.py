"""What is compiled ahead of a rollout's later sizes is what the rollout calls there."""

from concurrent.futures import Future, wait

import jax
import numpy as np
import pytest

from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.parallel.compile_ahead import CompileAhead
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.rollout import live_rows
from spatial_ssrl_jax.rollout.engine import Engine, Rollout
from spatial_ssrl_jax.rollout.sampling import Sampling
from spatial_ssrl_jax.rollout.schedule import DecodeShape
from tests.conftest import random_params
from tests.helpers.processes import printed
from tests.rl.conftest import CONFIG, make_prompt

PROGRAMS = ("decode_chunk", "grow_layer", "select_samples", "select_prompts")
STOPS = tuple(range(0, 90, 5))  # some 20% of what is drawn ends a response


class WaitedFor(CompileAhead):
    """Its thread has done a job when it is queued, so that later programs are the caller's own."""

    def add(self, key, job) -> None:
        super().add(key, job)
        wait([self._jobs[key]])


def sampled(devices: int, queue: CompileAhead, limit: int = 16) -> Rollout:
    """Responses to eight prompts, four each, with a long tail."""
    layout = Layout(make_mesh(MeshSettings(), jax.devices()[:devices]))
    sampling, compute = layout.rollout(min(2, devices)), Compute(attention_chunk=16)
    params = jax.device_put(random_params(CONFIG, seed=0), layout.param_shardings(CONFIG))
    rng = np.random.default_rng(0)
    prompts = pad_prompts([make_prompt(rng, 4 + n, []) for n in range(8)], 16, 0)
    made = Engine(CONFIG, compute, STOPS, 8, 2, sampling.batch_shards, sampling, queue)
    return made.generate(
        params,
        made.fill(params),
        [layout.put_batch(prompts)],
        group_size=4,
        max_new_tokens=limit,
        key=jax.random.key(5),
        prompt_index=[layout.put_batch(np.arange(8, dtype=np.int32))],
        sampling=Sampling(1.0),
    )


# Prints how many sizes there are, how many decode programs were compiled, and how many programs
# after the first one; then the last without a queue, and whether the rollouts are equal.
IN_A_PROCESS = """
import jax, numpy as np
from spatial_ssrl_jax.monitoring.process_stats import CompilationCounter
from spatial_ssrl_jax.parallel.compile_ahead import CompileAhead
from spatial_ssrl_jax.rollout import engine
from tests.rollout.test_decode_ahead import PROGRAMS, WaitedFor, sampled

counter, decode, devices = CompilationCounter(), engine.decode_chunk, len(jax.devices())

def watched(*args):
    state = decode(*args)
    counts.append(counter.count(PROGRAMS))
    return state

engine.decode_chunk, counts, queue = watched, [], WaitedFor(enabled=True)
ahead = sampled(devices, queue)
queue.close()
print(len(queue._jobs), counter.count(["decode_chunk"]), counts[-1] - counts[0])
if devices == 1:
    jax.clear_caches()
    jax.config.update("jax_enable_compilation_cache", False)
    counts.clear()
    rollout = sampled(devices, CompileAhead(enabled=False))
    print(counts[-1] - counts[0])
    for name in ("tokens", "logprobs", "length"):
        print(int(np.array_equal(getattr(ahead, name), getattr(rollout, name))))
"""


def test_later_sizes_are_compiled_by_the_thread_alone():
    """And the numbers are the same to the bit."""
    sizes, compiled, late_ahead, late, *equal = printed(IN_A_PROCESS, devices=1)
    assert (sizes, compiled, late_ahead) == (6, 6, 0)
    # Two later sizes; a cache grows, and samples move twice with their caches and prompts.
    assert late == 11 and equal == [1, 1, 1]


def test_they_are_compiled_with_the_shardings_that_they_are_called_with():
    assert printed(IN_A_PROCESS, devices=4) == [5, 5, 0]


class Asked(CompileAhead):
    """A queue that does nothing: jobs wait."""

    def add(self, key, job) -> None:
        self._jobs.setdefault(key, Future())

    def shapes(self, claimed: bool) -> list[DecodeShape]:
        """Those that are claimed, or wait."""
        return [key[-1] for key, job in self._jobs.items() if job.cancelled() == claimed]


def test_a_size_is_claimed_before_samples_are_moved_there(monkeypatch: pytest.MonkeyPatch):
    queue, seen, resize = Asked(enabled=True), [], live_rows.LiveRows.resize

    def watched(rows, shape, *args):
        seen.append(shape)
        assert shape in queue.shapes(claimed=True)
        resize(rows, shape, *args)

    monkeypatch.setattr(live_rows.LiveRows, "resize", watched)
    rollout = sampled(1, queue)
    assert len(set(seen)) == 3
    assert set(queue.shapes(claimed=True)) == set(seen)
    assert queue.shapes(claimed=False)
    sampled(1, queue, limit=8)  # another rollout, of one size
    assert not queue.shapes(claimed=False)
    assert np.array_equal(rollout.tokens, sampled(1, CompileAhead(enabled=False)).tokens)
