"""The head a block at a time, against the whole softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.learn.head import Blocks, _logprobs, block_count

VOCABULARY, WIDTH, TOKENS = 96, 8, 11


def whole(temperature: float, head, hidden, tokens):
    logits = jax.nn.log_softmax(hidden @ head.T / temperature)
    entropy = -jnp.sum(jnp.exp(logits) * logits, axis=-1)
    return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0], entropy


@pytest.mark.parametrize("blocks", [Blocks(1, 1), Blocks(1, 6), Blocks(2, 3)])
def test_blocks_give_the_whole_softmax_and_its_gradients(blocks):
    rng = np.random.default_rng(0)
    head = 5 * rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    head[::7] -= 20  # many far below the top, so that the top moves from block to block
    hidden = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    tokens = rng.permutation(VOCABULARY)[:TOKENS].astype(np.int32)
    share = rng.normal(size=TOKENS).astype(np.float32)

    def weighed(logprobs, head, hidden):
        found, entropy = logprobs(head, hidden, tokens)
        return (share * found).sum(), (found, entropy)

    def both(logprobs):
        call = jax.value_and_grad(lambda *a: weighed(logprobs, *a), (0, 1), has_aux=True)
        return jax.jit(call)(head, hidden)

    found = both(lambda *a: _logprobs(0.7, blocks, *a))
    wanted = both(lambda *a: whole(0.7, *a))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("size", "most", "count"),
    [(151936, 4096, 64), (152064, 4096, 44), (96, 32, 3), (96, 4096, 1), (7919, 4096, 1)],
)
def test_blocks_divide_the_vocabulary(size: int, most: int, count: int):
    assert block_count(size, most) == count
