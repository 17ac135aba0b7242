"""The output layer and its softmax, without ever holding the whole logits.

The vocabulary is processed in blocks, all tokens at once: each pass reads the weights once, and a
block's part of their gradient is one matmul, accumulated in float32 and written once. On a mesh a
device holds one block whole at a time, and its own shard of all others. Cut Cross-Entropy (arXiv
2411.09009) does the same inside one kernel.

Shape letters: B rows, T tokens, V vocabulary entries, D model width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from spatial_ssrl_jax.parallel.mesh import BATCH_AXES
from spatial_ssrl_jax.parallel.sharding import EMBED_AXIS
from spatial_ssrl_jax.qwen_vl.compute import Compute


class VocabBlocks(NamedTuple):
    """How the vocabulary is split.

    Attributes:
      shards: shards of the vocabulary on different devices (`tensor`).
      per_shard: blocks of each shard.
      gathered: mesh axis over which each block's widths are gathered, if they are sharded.
    """

    shards: int
    per_shard: int
    gathered: str | None = None


def head_logprobs(
    compute: Compute, head_VD: Array, hidden_BTD: Array, tokens_BT: Array, temperature: float
) -> tuple[Array, Array]:
    """Log-softmax of logits/temperature at each token, and the entropy there.

    Args:
      compute: entries of the vocabulary at a time, and the sharding of rows.
      head_VD: the output layer's weights, in the compute dtype.
      hidden_BTD: hidden states, in the compute dtype.
      tokens_BT: int32, whose log-probabilities are wanted.
      temperature: divides the logits.

    Returns:
      Two [B, T] float32 arrays: log-probabilities (differentiable) and entropies in nats (not
      differentiable).
    """
    hidden_BTD = compute.constrain(hidden_BTD)
    sharding = compute.batch_sharding
    sizes = {} if sharding is None else {str(a): n for a, n in sharding.mesh.shape.items()}
    shards = sizes.get("tensor", 1)
    gathered = EMBED_AXIS if sizes.get(EMBED_AXIS, 1) > 1 else None
    blocks = VocabBlocks(
        shards, block_count(head_VD.shape[0] // shards, compute.vocab_block), gathered
    )

    def logprobs(head_VD: Array, hidden_BTD: Array, tokens_BT: Array) -> tuple[Array, Array]:
        hidden = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        found = _logprobs(temperature, blocks, head_VD, hidden, tokens_BT.reshape(-1))
        return found[0].reshape(tokens_BT.shape), found[1].reshape(tokens_BT.shape)

    if sharding is not None and any(sizes[axis] > 1 for axis in BATCH_AXES):
        # Explicit: the compiler would gather the whole head, and sum its gradient on every chip.
        logprobs = jax.shard_map(
            logprobs,
            mesh=sharding.mesh,
            in_specs=(P(None, gathered), P(BATCH_AXES), P(BATCH_AXES)),
            out_specs=P(BATCH_AXES),
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )
    return logprobs(head_VD, hidden_BTD, tokens_BT)


def block_count(size: int, max_entries: int) -> int:
    """The number of equal blocks, each of at most `max_entries` entries, that `size` divides into.

    A size without a divisor near `max_entries` is one block.
    """
    count = next(n for n in range(-(-size // max_entries), size + 1) if size % n == 0)
    return count if size // count * 8 >= max_entries else 1


def _plain_logprobs(
    temperature: float, blocks: VocabBlocks, head_VD: Array, hidden_TD: Array, tokens_T: Array
) -> tuple[Array, Array]:
    """Log-probabilities and entropies; the backward pass recomputes each block's logits."""
    return _forward(temperature, blocks, head_VD, hidden_TD, tokens_T)[0]


_logprobs = jax.custom_vjp(_plain_logprobs, nondiff_argnums=(0, 1))


def _split_blocks(blocks: VocabBlocks, head_VD: Array) -> Array:
    """The weights as [blocks, entries, D]; each block has an equal part of every tensor shard."""
    shards, count, _ = blocks
    size, width = head_VD.shape
    split = head_VD.reshape(shards, count, size // (shards * count), width)
    return split.swapaxes(0, 1).reshape(count, size // count, width)


def _merge_blocks(blocks: VocabBlocks, split: Array) -> Array:
    """The inverse of `_split_blocks`."""
    shards, count, _ = blocks
    _, entries, width = split.shape
    return split.reshape(count, shards, entries // shards, width).swapaxes(0, 1).reshape(-1, width)


def _locate(blocks: VocabBlocks, size: int, tokens: Array) -> tuple[Array, Array]:
    """The block of each token, and its index there."""
    shards, count, _ = blocks
    part = size // (shards * count)
    shard, inside = tokens // (count * part), tokens % (count * part)
    return inside // part, shard * part + inside % part


def _gather(blocks: VocabBlocks, head_VD: Array) -> Array:
    """A block with all of its widths."""
    if not blocks.gathered:
        return head_VD
    return jax.lax.all_gather(head_VD, blocks.gathered, axis=1, tiled=True)


def _logits(temperature: float, head_VD: Array, hidden_TD: Array) -> Array:
    logits = jnp.einsum("td,vd->tv", hidden_TD, head_VD, preferred_element_type=jnp.float32)
    return logits if temperature == 1 else logits / temperature


def _forward(
    temperature: float, blocks: VocabBlocks, head_VD: Array, hidden_TD: Array, tokens_T: Array
):
    block_T, index_T = _locate(blocks, head_VD.shape[0], tokens_T)

    def step(carry: tuple[Array, ...], block: tuple[Array, Array]):
        top, whole, spread, chosen = carry
        number, head = block[0], _gather(blocks, block[1])
        logits = _logits(temperature, head, hidden_TD)
        highest = jnp.maximum(top, logits.max(axis=-1))
        shifted = logits - highest[:, None]
        weight = jnp.exp(shifted)
        shrink = jnp.exp(top - highest)
        # `spread` is the sum of weight * (logit - top): what was there moves with the top.
        spread = shrink * (spread + whole * (top - highest)) + jnp.sum(weight * shifted, -1)
        whole = shrink * whole + weight.sum(axis=-1)
        here = jnp.take_along_axis(logits, index_T[:, None], axis=-1)[:, 0]
        chosen = jnp.where(block_T == number, here, chosen)
        return (highest, whole, spread, chosen), None

    zero = jnp.zeros(hidden_TD.shape[0], jnp.float32)
    lowest = jnp.full_like(zero, jnp.finfo(jnp.float32).min)
    start = (lowest, zero, zero, zero)
    numbered = (jnp.arange(blocks.per_shard), _split_blocks(blocks, head_VD))
    (top, whole, spread, chosen), _ = jax.lax.scan(step, start, numbered)
    total = top + jnp.log(whole)
    found = (chosen - total, jnp.log(whole) - spread / whole)
    return found, (head_VD, hidden_TD, tokens_T, total)


def _backward(
    temperature: float, blocks: VocabBlocks, kept: tuple[Array, ...], gradients: tuple[Array, Array]
):
    head_VD, hidden_TD, tokens_T, total = kept
    scale = (gradients[0] / temperature)[:, None]
    block_T, index_T = _locate(blocks, head_VD.shape[0], tokens_T)

    def step(of_hidden: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
        number, head = block[0], _gather(blocks, block[1])
        logits = _logits(temperature, head, hidden_TD)
        index = jnp.where(block_T == number, index_T, -1)
        chosen = jnp.arange(logits.shape[-1]) == index[:, None]
        of_logits = scale * (chosen - jnp.exp(logits - total[:, None]))
        of_logits = of_logits.astype(hidden_TD.dtype)
        sums = dict(preferred_element_type=jnp.float32)
        of_hidden += jnp.einsum("tv,vd->td", of_logits, head, **sums)
        of_head = jnp.einsum("tv,td->vd", of_logits, hidden_TD, **sums)
        if blocks.gathered:
            of_head = jax.lax.psum_scatter(
                of_head, blocks.gathered, scatter_dimension=1, tiled=True
            )
        return of_hidden, of_head.astype(head.dtype)

    start = jnp.zeros(hidden_TD.shape, jnp.float32)
    numbered = (jnp.arange(blocks.per_shard), _split_blocks(blocks, head_VD))
    of_hidden, of_head = jax.lax.scan(step, start, numbered)
    return _merge_blocks(blocks, of_head), of_hidden.astype(hidden_TD.dtype), None


_logprobs.defvjp(_forward, _backward)
