"""The head a block at a time, against the whole softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.rl.head import VocabBlocks, _logprobs, block_count
from tests.helpers.processes import printed

VOCABULARY, WIDTH, TOKENS = 96, 8, 11


def whole(temperature: float, head, hidden, tokens):
    logits = jax.nn.log_softmax(hidden @ head.T / temperature)
    entropy = -jnp.sum(jnp.exp(logits) * logits, axis=-1)
    return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0], entropy


@pytest.mark.parametrize("blocks", [VocabBlocks(1, 1), VocabBlocks(1, 6), VocabBlocks(2, 3)])
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


ON_MESHES = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.rl.head import head_logprobs
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.parallel.mesh import BATCH_AXES, make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout

rng = np.random.default_rng(0)
head, hidden = (rng.normal(size=s).astype(np.float32) for s in ((192, 16), (8, 6, 16)))
tokens = rng.integers(0, 192, (8, 6)).astype(np.int32)
first = None
for sizes in ((1, 1, 1), (1, 8, 1), (8, 1, 1), (2, 2, 2), (1, 1, 4)):
    devices = jax.devices()[: np.prod(sizes)]
    layout = Layout(make_mesh(MeshSettings(*sizes), devices))
    compute = Compute(vocab_block=24, batch_sharding=layout.batch_sharding())
    put = lambda x, *axes: jax.device_put(x, NamedSharding(layout.mesh, P(*axes)))
    args = put(head, "tensor", "fsdp"), put(hidden, BATCH_AXES), put(tokens, BATCH_AXES)

    def loss(head, hidden, tokens):
        found = head_logprobs(compute, head, hidden, tokens, 0.7)
        return found[0].sum(), found

    found = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*args)
    found = [np.asarray(x) for x in jax.tree.leaves(found)]
    first = first or found
    print(max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, first)))
"""


def test_meshes_give_what_one_device_gives():
    """Rows, widths and vocabulary cut, each alone and together."""
    apart = printed(ON_MESHES, devices=8)
    assert len(apart) == 5 and max(apart) < 2e-6, apart
