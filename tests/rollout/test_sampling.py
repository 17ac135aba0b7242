"""Drawing tokens: exact proportions from evenly spaced uniforms, truncation, suppression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.rollout.sampling import GREEDY, Sampling, sample, sample_keys, uniforms

DRAWS = 3000
LARGEST = np.nextafter(np.float32(1), np.float32(0))


@pytest.fixture(scope="module")
def draw():
    """`sample` of one row of logits at many uniforms."""
    compiled = jax.jit(sample, static_argnums=(2, 3))

    def run(logits, uniform, sampling=Sampling(), suppressed=()):  # noqa: B008 - frozen
        logits = np.asarray(logits, np.float32)
        rows = np.broadcast_to(logits, (len(uniform), len(logits)))
        uniform = jnp.asarray(uniform, jnp.float32)
        return [np.asarray(x) for x in compiled(rows, uniform, sampling, suppressed)]

    return run


def evenly(count=DRAWS):
    return ((np.arange(count) + 0.5) / count).astype(np.float32)


def softmax(logits):
    weight = np.exp(np.float64(logits) - np.max(logits))
    return weight / weight.sum()


def random_logits(size, scale=2.0):
    return scale * np.random.default_rng(size).normal(size=size).astype(np.float32)


@pytest.mark.parametrize("size", [7, 512, 700])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_token_is_drawn_in_proportion(draw, size, temperature):
    """N evenly spaced uniforms give token v N·p(v) times, to within two."""
    logits = random_logits(size)
    token, logprob = draw(logits, evenly(), Sampling(temperature))
    expected = softmax(logits / temperature)
    counts = np.bincount(token, minlength=size)
    assert len(counts) == size
    assert np.abs(counts - DRAWS * expected).max() < 2
    np.testing.assert_allclose(logprob, np.log(expected)[token], atol=2e-5)
    assert (np.diff(token) >= 0).all(), "the inverse of a cumulative sum increases with the uniform"


@pytest.mark.parametrize("size", [7, 700])
def test_first_and_last_uniform(draw, size):
    """0 gives the first token that can be drawn, and just under 1 the last one."""
    token, _ = draw(np.zeros(size), [0.0, LARGEST], suppressed=(0, 1, size - 1))
    assert token.tolist() == [2, size - 2]
    peak = np.full(size, -200.0)
    peak[3] = 0.0
    assert draw(peak, [0.0, 0.5, LARGEST])[0].tolist() == [3, 3, 3]


def test_tokens_without_weight_are_never_drawn(draw):
    """Rounding in the cumulative sums must not reach a suppressed token, wherever it is."""
    rng = np.random.default_rng(1)
    suppressed = tuple(np.flatnonzero(rng.random(700) < 0.7).tolist()) + tuple(range(500, 560))
    uniform = np.concatenate((rng.random(10_000), [0.0, LARGEST])).astype(np.float32)
    token, _ = draw(random_logits(700), uniform, suppressed=suppressed)
    assert not np.isin(token, suppressed).any()


@pytest.mark.parametrize("lead", [3.0, 90.0, 500.0])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_p=0.9)])
def test_suppressed_token_with_the_largest_logit(draw, lead, sampling):
    """The others keep their proportions, however far the suppressed one is ahead."""
    logits = random_logits(700)
    order = np.argsort(-logits)
    without = np.delete(logits, order[0])
    logits[order[0]] = logits[order[1]] + lead
    token, logprob = draw(logits, evenly(2000), sampling, (int(order[0]),))
    if sampling == GREEDY:
        assert set(token.tolist()) == {int(order[1])}
    elif sampling.top_p == 1:
        fraction = np.mean(token == order[1])
        assert fraction == pytest.approx(softmax(without).max(), abs=2e-3)
        assert len(set(token.tolist())) > 100
    assert not (token == order[0]).any()
    with np.errstate(divide="ignore"):
        shifted = np.float64(logits) - logits.max()
    expected = shifted - np.log(np.exp(shifted).sum())  # before suppression
    np.testing.assert_allclose(logprob, expected[token], rtol=1e-6, atol=2e-5)


def test_greedy_tells_near_ties_apart(draw):
    """The plain argmax, even where exp() of the difference rounds to one."""
    logits = np.full(600, -3.0, np.float32)
    logits[[5, 100]] = 0.1
    logits[400] = np.nextafter(np.float32(0.1), np.float32(1))
    assert draw(logits, [0.0], GREEDY)[0].tolist() == [400]
    token, logprob = draw(logits, [0.0], GREEDY, (400,))
    assert token.tolist() == [5]
    np.testing.assert_allclose(logprob, np.log(softmax(logits))[5], atol=1e-5)


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (5, 1.0), (0, 0.4), (0, 1e-6), (40, 0.7)])
def test_truncation(draw, top_k, top_p):
    """The kept tokens are drawn in proportion; log-probabilities are of all tokens."""
    logits = random_logits(700)
    whole = softmax(logits)
    kept = np.argsort(-whole)[: top_k or None]
    ahead = np.cumsum(whole[kept]) - whole[kept]
    kept = kept[ahead < top_p * whole[kept].sum()]
    token, logprob = draw(logits, evenly(), Sampling(top_k=top_k, top_p=top_p))
    counts = np.bincount(token, minlength=700)
    assert set(np.flatnonzero(counts)) == set(kept.tolist())
    expected = whole[kept] / whole[kept].sum()
    assert np.abs(counts[kept] - DRAWS * expected).max() < 2
    np.testing.assert_allclose(logprob, np.log(whole)[token], atol=2e-5)


def test_uniforms_depend_on_prompt_sample_and_step_alone():
    key = jax.random.key(7)
    keys = sample_keys(key, jnp.array([4, 9, 2]), 5)
    drawn = np.stack([uniforms(keys, step) for step in range(40)])
    assert len(np.unique(drawn)) > 0.99 * drawn.size
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.05 and abs(drawn.var() - 1 / 12) < 0.02
    other = sample_keys(key, jnp.array([2, 4]), 3)
    np.testing.assert_array_equal(uniforms(other, 11), drawn[11][[2, 0], :3])
    assert not np.isin(uniforms(sample_keys(jax.random.key(8), jnp.array([4]), 5), 0), drawn).any()
