"""Drawing a token: inverse CDF in two levels, one uniform a row.

A cumulative sum over 152k entries is the costly part of sampling, so probabilities are summed in
blocks, a block is chosen by its sum, and only that block is summed up inside.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; 0 is greedy, the plain argmax.
      top_p: keeps the likeliest tokens that together reach this probability; 1 keeps all.
      top_k: keeps this many of the likeliest tokens; 0 keeps all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def scale(self) -> float:
        """What logits are divided by before log-probabilities are taken."""
        return self.temperature or 1.0


GREEDY = Sampling(temperature=0.0)


def sample_keys(key: Array, prompt_index: Array, group: int) -> Array:
    """One key for each sample, from the run's key, the prompt's index and the sample's place.

    Args:
      key: key of the step.
      prompt_index: [B] int32, the prompt's place in the step, whatever the batch it is in.
      group: G.

    Returns:
      [B, G] keys.
    """
    prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_index)
    fold_samples = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(fold_samples, (0, None))(prompt_keys, jnp.arange(group))


def uniforms(keys_BG: Array, step: Array) -> Array:
    """[B, G] float32 in [0, 1) for response place `step`."""
    flat = keys_BG.reshape(-1)
    draw = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))
    return draw(flat).reshape(keys_BG.shape)


def sample(
    logits: Array, uniform: Array | None, sampling: Sampling, suppressed: tuple[int, ...]
) -> tuple[Array, Array]:
    """Draws one token a row.

    Args:
      logits: [..., V] float32.
      uniform: [...] float32 in [0, 1); unused when greedy.
      sampling: temperature and truncation.
      suppressed: token ids that are never drawn.

    Returns:
      [...] int32 tokens, and [...] float32 log-softmax of logits/temperature at them, taken before
      suppression and truncation.
    """
    logits = logits if sampling.scale == 1 else logits / sampling.scale
    left_out = np.array(suppressed, np.int32)
    allowed = np.ones(logits.shape[-1], bool)
    allowed[left_out] = False
    # Few blocks hold tokens that are left out: masking those alone spares a pass over all logits.
    rows, known = _blocks(logits), _blocks(allowed)
    mixed = np.flatnonzero(~known.all(axis=-1))
    masked = jnp.where(known[mixed], rows[..., mixed, :], -jnp.inf)
    # The top is an allowed token's: under a far larger suppressed one, all would round to zero.
    tops = rows.max(axis=-1).at[..., mixed].set(masked.max(axis=-1))
    top = tops.max(axis=-1, keepdims=True)
    block_sum = jnp.exp(rows - top[..., None]).sum(axis=-1)
    block_sum = block_sum.at[..., mixed].set(jnp.exp(masked - top[..., None]).sum(axis=-1))
    log_allowed = top + jnp.log(block_sum.sum(axis=-1, keepdims=True))
    every = jnp.concatenate((log_allowed, logits[..., left_out]), axis=-1)
    log_total = jax.nn.logsumexp(every, axis=-1)

    def weigh(logits: Array, allowed: Array) -> Array:
        return jnp.where(allowed, jnp.exp(logits - top), 0.0)

    if sampling.temperature == 0:
        token = jnp.argmax(jnp.where(allowed, logits, -jnp.inf), axis=-1).astype(jnp.int32)
    elif sampling.top_k == 0 and sampling.top_p >= 1.0:
        # Weights are recomputed inside the block: kept whole they cost more than the sums.
        inside = lambda b: weigh(_block(rows, b), jnp.asarray(known)[b])  # noqa: E731
        token = _inverse_cdf(block_sum, inside, uniform)
    else:
        weight = _blocks(_truncate(weigh(logits, allowed), sampling))
        token = _inverse_cdf(weight.sum(axis=-1), lambda b: _block(weight, b), uniform)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token, chosen - log_total


def _block_size(size: int) -> int:
    """Entries of a block: a power of two that divides `size`, where one does, so that none is
    padded."""
    return next((n for n in (512, 256, 128, 64) if size % n == 0), 512)


def _blocks(x: Array) -> Array:
    """[..., V] -> [..., V / block, block], zeros after the last entry."""
    block = _block_size(x.shape[-1])
    if x.shape[-1] % block:
        padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
        x = (jnp if isinstance(x, Array) else np).pad(x, padding)
    return x.reshape(*x.shape[:-1], -1, block)


def _block(blocks: Array, number: Array) -> Array:
    """Each row's block of the given number."""
    return jnp.take_along_axis(blocks, number[..., None, None], axis=-2)[..., 0, :]


def _truncate(weight: Array, sampling: Sampling) -> Array:
    """Zeroes what top-k and top-p leave out; the likeliest token always stays."""
    ordered = jnp.sort(weight, axis=-1)[..., ::-1]
    if sampling.top_k:
        rank = jnp.arange(ordered.shape[-1])
        ordered = jnp.where(rank < sampling.top_k, ordered, 0.0)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    kept = (before < sampling.top_p * ordered.sum(axis=-1, keepdims=True)) & (ordered > 0)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(weight >= least, weight, 0.0)


def _inverse_cdf(block_sum: Array, inside: Callable[[Array], Array], uniform: Array) -> Array:
    """The index at which the running sum of weights passes `uniform` of the whole.

    Args:
      block_sum: [..., N] sum of each block's weights.
      inside: gives the weights of each row's block of a given number, [..., block].
      uniform: [...] float32 in [0, 1).
    """
    block_end = jnp.cumsum(block_sum, axis=-1)
    goal = uniform * block_end[..., -1]
    block = _first_above(block_end, goal, block_sum)
    before = jnp.take_along_axis(block_end, jnp.maximum(block - 1, 0)[..., None], axis=-1)[..., 0]
    before = jnp.where(block > 0, before, 0.0)
    weight = inside(block)
    place = _first_above(jnp.cumsum(weight, axis=-1), goal - before, weight)
    return (block * weight.shape[-1] + place).astype(jnp.int32)


def _first_above(running: Array, goal: Array, weight: Array) -> Array:
    """The first place with any weight whose running sum passes the goal.

    Rounding can leave a parallel running sum short of the goal, or raise it where there is no
    weight: such places are passed over, and the last one with weight is in at the end.
    """
    possible = weight > 0
    passed = possible & (running > goal[..., None])
    last = weight.shape[-1] - 1 - jnp.argmax(possible[..., ::-1], axis=-1)
    return jnp.where(passed.any(axis=-1), jnp.argmax(passed, axis=-1), last)
