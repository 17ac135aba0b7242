"""Loss and gradient of a mixed batch against a plain per-sample reference."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spatial_ssrl_jax.config.schema import GrpoSettings
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.rl.losses import GrpoLoss
from spatial_ssrl_jax.rl.train_step import initial_train_state, train_step
from tests.helpers.groups import sequence, sequence_logprobs
from tests.rl.conftest import CONFIG

TEMPERATURE = 0.7
# The programs run for milliseconds and compile for seconds.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LOSS = GrpoLoss(
    CONFIG, Compute(attention_chunk=16, vocab_block=32), GrpoSettings(temperature=TEMPERATURE)
)


@partial(jax.jit, compiler_options=QUICK)
@jax.value_and_grad
def plain_loss(params, whole, response, advantage, old, reference):
    """The loss of the paper (arXiv 2510.27606) for one sample: the sum over its tokens."""
    logprob = sequence_logprobs(CONFIG, params, whole, response, TEMPERATURE)
    ratio = jnp.exp(jnp.clip(logprob - old, -20, 20))
    policy = jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 0.8, 1.3))
    policy = jnp.where(advantage < 0, jnp.minimum(policy, -3.0 * advantage), policy)
    d = jnp.clip(reference - logprob, -20, 20)
    return jnp.sum(policy + 0.01 * jnp.clip(jnp.exp(d) - d - 1, -10, 10))


@pytest.fixture(scope="module")
def reference(small_params, mixed):
    """The whole batch's loss and gradient, one sample with its own prompt after another."""
    total, gradients = 0.0, jax.tree.map(jnp.zeros_like, small_params)
    for b, g in np.ndindex(mixed.length.shape):
        own = b, g, slice(mixed.length[b, g])
        value, more = plain_loss(
            small_params,
            sequence(mixed.prompts[b], mixed.tokens[own]),
            mixed.tokens[own],
            mixed.advantage[b, g],
            mixed.old_logprobs[own],
            mixed.reference_logprobs[own],
        )
        weight = mixed.weight[b, g]
        total += float(value) * weight
        gradients = jax.tree.map(lambda x, y, w=weight: x + w * y, gradients, more)
    return total, gradients


def assert_close(gradients, expected, limit):
    for (path, got), want in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(want).max()
        assert scale > 0, path
        assert np.abs(got - want).max() <= limit * scale, path


GRADIENT = jax.jit(jax.value_and_grad(LOSS, has_aux=True), compiler_options=QUICK)


@pytest.mark.parametrize(
    "rows",
    [[[0, 2], [1]], [[0], [1], [2]], [[2, 1, 0]], [[1, 2, 0]], [[], [0, 1, 2]]],
    ids=lambda rows: "|".join("".join(map(str, row)) for row in rows),
)
def test_packed_loss_is_the_per_sample_loss(small_params, mixed, reference, rows):
    """However groups are packed."""
    (value, sums), gradients = GRADIENT(small_params, mixed.packed(CONFIG, rows))
    assert float(value) == pytest.approx(float(reference[0]), rel=1e-5)
    assert_close(gradients, reference[1], 1e-5)
    assert 0 < float(sums["policy/clip_high"]) < 1
    assert 0 < float(sums["policy/clip_low"]) < 1


def test_padding_changes_nothing(small_params, mixed, reference):
    """More tokens, patches and places than are used."""
    batch = mixed.packed(CONFIG, [[0, 2], [1]], spare=17)
    (value, _), gradients = GRADIENT(small_params, batch)
    assert float(value) == pytest.approx(float(reference[0]), rel=1e-5)
    assert_close(gradients, reference[1], 1e-5)


@pytest.mark.parametrize("rows", [[[[0]], [[1]], [[2]]], [[[0, 2]], [[1]]]])
def test_micro_batches_do_not_change_it(small_params, mixed, reference, rows):
    optimizer = optax.sgd(1.0)  # the change of the weights is the gradient itself
    state = initial_train_state(optimizer, jax.tree.map(jnp.array, small_params))
    pieces = [mixed.packed(CONFIG, part) for part in rows]
    state, metrics = train_step(LOSS, optimizer, state, pieces)
    change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), small_params, state.params)
    norm = optax.tree.norm(reference[1])
    assert float(metrics["optim/gradient_norm"]) == pytest.approx(float(norm), rel=1e-5)
    assert float(metrics["loss/total"]) == pytest.approx(float(reference[0]), rel=1e-5)
    assert_close(change, reference[1], 2e-3)  # subtraction of near-equal weights costs digits


def test_non_finite_gradient_is_skipped(small_params, mixed_batch):
    optimizer = optax.adam(1e-3)
    state = initial_train_state(optimizer, jax.tree.map(jnp.array, small_params))
    broken = replace(mixed_batch, advantage=np.full_like(mixed_batch.advantage, np.nan))
    state, metrics = train_step(LOSS, optimizer, state, [broken])
    assert float(metrics["optim/skipped"]) == 1
    assert (int(state.skipped), int(state.updates)) == (1, 0)
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(small_params), strict=True):
        np.testing.assert_array_equal(got, want)
    state, metrics = train_step(LOSS, optimizer, state, [mixed_batch])
    assert (int(state.skipped), int(state.updates)) == (0, 1)
