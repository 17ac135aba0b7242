"""Moments that rest in host memory: where they are between steps, and that nothing else changes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spatial_ssrl_jax.parallel import offload
from spatial_ssrl_jax.rl.train_step import initial_train_state, train_step


def loss(params: dict, batch: jax.Array) -> tuple[jax.Array, dict]:
    return jnp.sum((params["w"] * batch - 1) ** 2), {}


def kinds(tree) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def test_arrays_go_to_the_host_and_back():
    there = offload.to_host({"a": jnp.arange(5.0)})
    back = offload.to_device(there)
    assert (kinds(there), kinds(back)) == ({"pinned_host"}, {"device"})
    assert back["a"].tolist() == [0, 1, 2, 3, 4]
    assert offload.to_device(back)["a"] is back["a"]


def test_steps_are_the_same_wherever_moments_rest():
    adam, batches = optax.adamw(0.1), [jnp.arange(3.0), jnp.ones(3)]
    found = []
    for rest in (lambda state: state, lambda s: replace(s, opt_state=offload.to_host(s.opt_state))):
        state = rest(initial_train_state(adam, {"w": jnp.full(3, 2.0)}))
        before = kinds(state.opt_state)
        for _ in range(2):
            state, _ = train_step(loss, adam, state, batches)
        assert kinds(state.opt_state) == before
        found.append(jax.device_get((state.trained, state.opt_state)))
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(ours, theirs)
