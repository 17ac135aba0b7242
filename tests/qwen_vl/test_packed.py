"""A group that shares its prompt equals its samples run one by one, gradients included."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.data.batching import pad_prompts, pad_responses
from spatial_ssrl_jax.qwen_vl import model as qwen
from spatial_ssrl_jax.qwen_vl.attention import attend, attend_shared
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.rope import text_rotary

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


def logprobs_of(model, hidden, tokens):
    logits = jnp.einsum("...d,vd->...v", hidden, model.text.head_weight(hidden.dtype))
    every = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(every, tokens[..., None], axis=-1)[..., 0]


@partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def shared(config, compute, params, batch, tokens, length, weights):
    """Log-probabilities [B, G, R] of groups that share their prompt, and their sum's gradient."""

    def loss(params):
        model = qwen.bind(config, params)
        hidden = qwen.response_hidden(config, model, batch, tokens, length, compute)
        found = logprobs_of(model, hidden, tokens)
        return jnp.sum(weights * found), found

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return found, gradient


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def one_by_one(config, params, batch, start, tokens, weights):
    """The same from whole sequences, one a row: prompt and response are one causal text."""

    def loss(params):
        model = qwen.bind(config, params)
        x = qwen.embed_prompt(model, batch, PLAIN)
        rotary = text_rotary(config.text, batch.position)
        hidden, _, _ = model.text.prefill(x, rotary, batch.valid, PLAIN)
        index = jnp.minimum(start[:, None] - 1 + jnp.arange(LIMIT), hidden.shape[1] - 1)
        hidden = jnp.take_along_axis(hidden, index[..., None], axis=1)
        found = logprobs_of(model, hidden, tokens)
        return jnp.sum(weights * found), found

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return found, gradient


@pytest.fixture(scope="module")
def run_shared(toy, prompts, weights):
    def run(responses, compute=PLAIN, tokens=32, windows=6):
        batch = pad_prompts(prompts, tokens, windows)
        padded = pad_responses(responses, LIMIT)
        return shared(toy.config, compute, toy.params, batch, *padded, weights)

    return run


@pytest.fixture(scope="module")
def grouped(run_shared, responses):
    return run_shared(responses)


def assert_same_gradient(found, expected, limit=1e-5):
    flat = jax.tree_util.tree_leaves_with_path(expected)
    for (path, one), other in zip(flat, jax.tree.leaves(found), strict=True):
        name, largest = jax.tree_util.keystr(path), float(jnp.abs(one).max())
        assert largest > 0, f"{name} gets no gradient"
        assert float(jnp.abs(one - other).max()) <= limit * largest, name


def test_equals_separate_sequences(toy, prompts, responses, weights, grouped):
    sequences = []
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            more = prompt.next_position + np.arange(len(response), dtype=np.int32)
            absent = np.full(len(response), -1, np.int32)
            sequences.append(
                replace(
                    prompt,
                    ids=np.concatenate((prompt.ids, response)),
                    position=np.concatenate((prompt.position, np.tile(more, (3, 1))), axis=1),
                    image_index=np.concatenate((prompt.image_index, absent)),
                )
            )
    tokens, length = pad_responses(responses, LIMIT)
    found, gradient = one_by_one(
        toy.config,
        toy.params,
        pad_prompts(sequences, 40, 5),
        np.repeat([len(p.ids) for p in prompts], 3),
        tokens.reshape(6, LIMIT),
        weights.reshape(6, LIMIT),
    )
    held = np.arange(LIMIT) < length[..., None]
    assert np.ptp(found) > 1
    np.testing.assert_allclose(
        np.asarray(grouped[0])[held], found.reshape(2, 3, LIMIT)[held], rtol=0, atol=2e-5
    )
    assert_same_gradient(grouped[1], gradient)


@pytest.mark.parametrize(
    "compute, tokens, windows",
    [(Compute(remat="full"), 32, 6), (Compute(attention_chunk=5, remat="dots"), 43, 9)],
    ids=["remat full", "remat dots, chunks of 5, more padding"],
)
def test_memory_and_padding_change_nothing(
    run_shared, responses, grouped, compute, tokens, windows
):
    found, gradient = run_shared(responses, compute, tokens, windows)
    held = np.arange(LIMIT) < np.array(LENGTHS)[..., None]
    before = np.asarray(grouped[0])
    np.testing.assert_allclose(np.asarray(found)[held], before[held], rtol=0, atol=2e-5)
    assert_same_gradient(gradient, grouped[1])


def test_responses_do_not_see_each_other(run_shared, responses, grouped):
    """Another response 1 of prompt 0 changes its own log-probabilities and no others."""
    changed = [list(group) for group in responses]
    changed[0][0] = (changed[0][0] + 17) % 600
    found = np.asarray(run_shared(changed)[0])
    before = np.asarray(grouped[0])
    assert np.abs(found[0, 0, :7] - before[0, 0, :7]).min() > 1e-3
    np.testing.assert_array_equal(found[0, 1:], before[0, 1:])
    np.testing.assert_array_equal(found[1], before[1])


def test_a_token_depends_only_on_those_before_it(run_shared, responses, grouped):
    changed = [list(group) for group in responses]
    changed[1][1] = changed[1][1].copy()
    changed[1][1][4] += 1
    found, before = np.asarray(run_shared(changed)[0][1, 1]), np.asarray(grouped[0][1, 1])
    np.testing.assert_array_equal(found[:4], before[:4])
    assert np.abs(found[4:7] - before[4:7]).min() > 1e-4


def test_attention_in_chunks(chunk=3):
    """Both functions, with a shorter last chunk and padded keys, against all queries at once."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    q, k, v = draw(2, 7, 4, 6), draw(2, 2, 7, 6), draw(2, 2, 7, 6)
    segment = jnp.array([[0, 0, 1, 1, 1, -1, -1], [0] * 7])
    whole = attend(q, k, v, segment, segment, causal=True, chunk=99)
    chunked = attend(q, k, v, segment, segment, causal=True, chunk=chunk)
    np.testing.assert_allclose(chunked, whole, atol=1e-6)

    own_q, own_k, own_v = draw(2, 3, 7, 4, 6), draw(2, 3, 2, 7, 6), draw(2, 3, 2, 7, 6)
    seen = jnp.broadcast_to(jnp.tril(jnp.ones((7, 7), bool)), (2, 3, 7, 7))
    both = [
        attend_shared(own_q, k, v, segment >= 0, own_k, own_v, seen, chunk=c) for c in (99, chunk)
    ]
    np.testing.assert_allclose(both[1], both[0], atol=1e-6)


def test_attention_by_hand():
    """Query 2 sees keys 1 and 2 (its segment, not after it): weights 1/4 and 3/4."""
    k = jnp.zeros((1, 1, 4, 4)).at[0, 0, 2, 0].set(2 * np.log(3.0))
    v = jnp.arange(16.0).reshape(1, 1, 4, 4)
    q = jnp.zeros((1, 4, 1, 4)).at[0, 2, 0, 0].set(1.0)
    segment = jnp.array([[0, 1, 1, 1]])
    out = attend(q, k, v, segment, segment, causal=True, chunk=99)
    np.testing.assert_allclose(out[0, 2, 0], 0.25 * v[0, 0, 1] + 0.75 * v[0, 0, 2], rtol=1e-6)
    open_ended = attend(q, k, v, segment, segment, causal=False, chunk=99)
    np.testing.assert_allclose(open_ended[0, 2, 0], v[0, 0, [1, 2, 2, 2, 3]].mean(0), rtol=1e-6)
