"""A group that shares its prompt equals its samples run one by one, gradients included."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.data.batching import pad_responses
from spatial_ssrl_jax.qwen_vl import model as qwen
from spatial_ssrl_jax.qwen_vl.attention import Visible, attend
from spatial_ssrl_jax.qwen_vl.compute import Compute
from tests.helpers.groups import pack_groups, sequence, sequence_logprobs, unpack

LENGTHS = ((7, 1, 4), (3, 7, 6))  # tokens of three responses to each of two prompts
LIMIT = 8
PLAIN = Compute(remat="none")
# The programs run for milliseconds and compile for seconds.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(scope="module")
def prompts(toy):
    """Two prompts of different lengths: two images in one, one in the other."""
    return [toy.prompt(0, 9, [(1, 4, 6), (1, 2, 10)]), toy.prompt(1, 4, [(1, 6, 2)])]


@pytest.fixture(scope="module")
def responses():
    rng = np.random.default_rng(2)
    return [[rng.integers(0, 600, n).astype(np.int32) for n in group] for group in LENGTHS]


@pytest.fixture(scope="module")
def weights():
    """The weight of each response token in the loss."""
    rng = np.random.default_rng(5)
    held = np.arange(LIMIT) < np.array(LENGTHS)[..., None]
    return np.where(held, rng.normal(size=held.shape), 0).astype(np.float32)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def of_rows(config, compute, params, rows, weights):
    """Log-probabilities [B, R] of packed rows, and the gradient of their weighted sum."""

    def loss(params):
        model = qwen.bind(config, params)
        hidden = qwen.packed_hidden(config, model, rows, compute)
        every = jax.nn.log_softmax(hidden @ model.text.head_weight(hidden.dtype).T)
        found = jnp.take_along_axis(every, rows.label[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * found), found

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return found, gradient


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def alone(config, params, whole, response, weights):
    """The same of one response, with a prompt of its own."""

    def loss(params):
        found = sequence_logprobs(config, params, whole, response)
        return jnp.sum(weights * found), found

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return found, gradient


@pytest.fixture(scope="module")
def run_packed(toy, prompts, weights):
    def run(responses, compute=PLAIN, rows=((0, 1),), spare=3):
        tokens, length = pad_responses(responses, LIMIT)
        packed, places = pack_groups(toy.config, prompts, tokens, length, rows, spare)
        found, gradient = of_rows(
            toy.config, compute, toy.params, packed, places.of_tokens(weights)
        )
        return unpack(places, found, tokens.shape), gradient

    return run


@pytest.fixture(scope="module")
def packed(run_packed, responses):
    return run_packed(responses)


def assert_same_gradient(found, expected, limit=1e-5):
    flat = jax.tree_util.tree_leaves_with_path(expected)
    for (path, one), other in zip(flat, jax.tree.leaves(found), strict=True):
        name, largest = jax.tree_util.keystr(path), float(jnp.abs(one).max())
        assert largest > 0, f"{name} gets no gradient"
        assert float(jnp.abs(one - other).max()) <= limit * largest, name


def test_equals_separate_sequences(toy, prompts, responses, weights, packed):
    found, gradient = np.zeros((2, 3, LIMIT)), jax.tree.map(jnp.zeros_like, toy.params)
    for b, g in np.ndindex(2, 3):
        response, own = responses[b][g], (b, g, slice(LENGTHS[b][g]))
        whole = sequence(prompts[b], response)
        found[own], more = alone(toy.config, toy.params, whole, response, weights[own])
        gradient = jax.tree.map(jnp.add, gradient, more)
    assert np.ptp(found) > 1
    np.testing.assert_allclose(packed[0], found, rtol=0, atol=2e-5)
    assert_same_gradient(packed[1], gradient)


@pytest.mark.parametrize(
    ("compute", "rows", "spare"),
    [
        (Compute(remat="full"), ((0,), (1,)), 3),
        (Compute(attention_chunk=5, remat="dots"), ((1, 0),), 12),
    ],
    ids=["remat full, a row each", "remat dots, chunks of 5, more padding, the other order"],
)
def test_memory_rows_and_padding_change_nothing(
    run_packed, responses, packed, compute, rows, spare
):
    found, gradient = run_packed(responses, compute, rows, spare)
    np.testing.assert_allclose(found, packed[0], rtol=0, atol=2e-5)
    assert_same_gradient(gradient, packed[1])


def test_responses_do_not_see_each_other(run_packed, responses, packed):
    """Another response 1 of prompt 0 changes its own log-probabilities and no others."""
    changed = [list(group) for group in responses]
    changed[0][0] = (changed[0][0] + 17) % 600
    found, before = run_packed(changed)[0], packed[0]
    assert np.abs(found[0, 0, :7] - before[0, 0, :7]).min() > 1e-3
    np.testing.assert_array_equal(found[0, 1:], before[0, 1:])
    np.testing.assert_array_equal(found[1], before[1])


def test_a_token_depends_only_on_those_before_it(run_packed, responses, packed):
    changed = [list(group) for group in responses]
    changed[1][1] = changed[1][1].copy()
    changed[1][1][4] += 1
    found, before = run_packed(changed)[0][1, 1], packed[0][1, 1]
    np.testing.assert_array_equal(found[:4], before[:4])
    assert np.abs(found[4:7] - before[4:7]).min() > 1e-4


def test_attention_by_hand():
    """Query 2 sees keys 1 and 2 (its segment, not after it): weights 1/4 and 3/4."""
    k = jnp.zeros((1, 1, 4, 4)).at[0, 0, 2, 0].set(2 * np.log(3.0))
    v = jnp.arange(16.0).reshape(1, 1, 4, 4)
    q = jnp.zeros((1, 4, 1, 4)).at[0, 2, 0, 0].set(1.0)
    segment = jnp.array([[0, 1, 1, 1]])
    out = attend(q, k, v, Visible.in_segments(segment, causal=True), chunk=99)
    np.testing.assert_allclose(out[0, 2, 0], 0.25 * v[0, 0, 1] + 0.75 * v[0, 0, 2], rtol=1e-6)
    open_ended = attend(q, k, v, Visible.in_segments(segment, causal=False), chunk=99)
    np.testing.assert_allclose(open_ended[0, 2, 0], v[0, 0, [1, 2, 2, 2, 3]].mean(0), rtol=1e-6)
