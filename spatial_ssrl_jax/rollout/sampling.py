"""Drawing a token: inverse CDF in two levels, one uniform a row.

A cumulative sum over 152k entries is the expensive part of sampling. So probabilities are summed in
blocks, a block is chosen by its sum, and the cumulative sum is taken inside that block alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

AnyArray = TypeVar("AnyArray", Array, np.ndarray)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; 0 is greedy, the plain argmax.
      top_p: keeps the likeliest tokens that together reach this probability; 1 keeps all.
      top_k: keeps this many of the likeliest tokens; 0 keeps all.
      greedy_last: the last sample of each group is greedy, whatever the others are.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy_last: bool = False

    @property
    def scale(self) -> float:
        """Divisor of the logits, before log-probabilities are taken."""
        return self.temperature or 1.0


GREEDY = Sampling(temperature=0.0)


def sample_keys(key: Array, prompt_index: Array, group: int) -> Array:
    """One key for each sample, from the step's key, the prompt's index and that in the group.

    Args:
      key: the step's key.
      prompt_index: [B] int32, the prompt's index in the step, whatever batch it is in.
      group: G.

    Returns:
      [B, G] keys.
    """
    prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_index)
    fold_samples = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(fold_samples, (0, None))(prompt_keys, jnp.arange(group))


def sample_group(
    logits_BGV: Array, uniform_BG: Array | None, sampling: Sampling, suppressed: tuple[int, ...]
) -> tuple[Array, Array]:
    """`sample` of groups, [B, G] tokens and log-probabilities, with `sampling.greedy_last`."""
    if not sampling.greedy_last:
        return sample(logits_BGV, uniform_BG, sampling, suppressed)
    drawn = None if uniform_BG is None else uniform_BG[:, :-1]
    parts = (
        sample(logits_BGV[:, :-1], drawn, sampling, suppressed),
        sample(logits_BGV[:, -1:], None, GREEDY, suppressed),
    )
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


def uniforms(keys_BG: Array, step: Array) -> Array:
    """[B, G] float32 in [0, 1) for the response token of index `step`."""
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
    never = np.array(suppressed, np.int32)
    allowed = np.ones(logits.shape[-1], bool)
    allowed[never] = False
    # Few blocks hold suppressed tokens: masking those alone saves a pass over all logits.
    rows, mask = _blocks(logits), _blocks(allowed)
    mixed = np.flatnonzero(~mask.all(axis=-1))
    masked = jnp.where(mask[mixed], rows[..., mixed, :], -jnp.inf)
    # The top is an allowed token's: under a far larger suppressed one, all would round to zero.
    tops = rows.max(axis=-1).at[..., mixed].set(masked.max(axis=-1))
    top = tops.max(axis=-1, keepdims=True)
    block_sum = jnp.exp(rows - top[..., None]).sum(axis=-1)
    block_sum = block_sum.at[..., mixed].set(jnp.exp(masked - top[..., None]).sum(axis=-1))
    log_allowed = top + jnp.log(block_sum.sum(axis=-1, keepdims=True))
    every = jnp.concatenate((log_allowed, logits[..., never]), axis=-1)
    log_total = jax.nn.logsumexp(every, axis=-1)

    def weigh(logits: Array, allowed: Array | np.ndarray) -> Array:
        return jnp.where(allowed, jnp.exp(logits - top), 0.0)

    if sampling.temperature == 0:
        token = jnp.argmax(jnp.where(allowed, logits, -jnp.inf), axis=-1).astype(jnp.int32)
    elif uniform is None:
        raise ValueError("sampling needs uniform draws")
    elif sampling.top_k == 0 and sampling.top_p >= 1.0:
        # Weights are recomputed inside the block: keeping all costs more than the sums.
        inside = lambda b: weigh(_block(rows, b), jnp.asarray(mask)[b])  # noqa: E731
        token = _inverse_cdf(block_sum, inside, uniform)
    else:
        weight = _blocks(_truncate(weigh(logits, allowed), sampling))
        token = _inverse_cdf(weight.sum(axis=-1), lambda b: _block(weight, b), uniform)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token, chosen - log_total


def _block_size(size: int) -> int:
    """Entries of a block: a power of two, one that divides `size` where possible."""
    return next((n for n in (512, 256, 128, 64) if size % n == 0), 512)


def _blocks(x: AnyArray) -> AnyArray:
    """[..., V] -> [..., V / block, block], zeros after the last entry."""
    block = _block_size(x.shape[-1])
    if x.shape[-1] % block:
        padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
        x = np.pad(x, padding) if isinstance(x, np.ndarray) else jnp.pad(x, padding)
    return x.reshape(*x.shape[:-1], -1, block)


def _block(blocks: Array, index: Array) -> Array:
    """[..., block], each row's block of the given index [...]."""
    return jnp.take_along_axis(blocks, index[..., None, None], axis=-2)[..., 0, :]


def _truncate(weight: Array, sampling: Sampling) -> Array:
    """Zeroes the weights that top-k and top-p exclude; the likeliest token always stays."""
    ordered = jnp.sort(weight, axis=-1)[..., ::-1]
    if sampling.top_k:
        rank = jnp.arange(ordered.shape[-1])
        ordered = jnp.where(rank < sampling.top_k, ordered, 0.0)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    kept = (before < sampling.top_p * ordered.sum(axis=-1, keepdims=True)) & (ordered > 0)
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(weight >= smallest, weight, 0.0)


def _inverse_cdf(block_sum: Array, inside: Callable[[Array], Array], uniform: Array) -> Array:
    """The index [...] int32 at which the cumulative sum of weights exceeds `uniform` of the total.

    Args:
      block_sum: [..., N] sum of each block's weights.
      inside: block index [...] -> weights [..., block] of that block in each row.
      uniform: [...] float32 in [0, 1).
    """
    block_end = jnp.cumsum(block_sum, axis=-1)
    target = uniform * block_end[..., -1]
    block = _first_above(block_end, target, block_sum)
    before = jnp.take_along_axis(block_end, jnp.maximum(block - 1, 0)[..., None], axis=-1)[..., 0]
    before = jnp.where(block > 0, before, 0.0)
    weight = inside(block)
    offset = _first_above(jnp.cumsum(weight, axis=-1), target - before, weight)
    return (block * weight.shape[-1] + offset).astype(jnp.int32)


def _first_above(running: Array, target: Array, weight: Array) -> Array:
    """The first index with any weight whose cumulative sum exceeds the target.

    Rounding can leave a parallel cumulative sum short of the target, or raise it where there is no
    weight: indices without weight are skipped, and the last one with weight is the fallback.
    """
    possible = weight > 0
    passed = possible & (running > target[..., None])
    last = weight.shape[-1] - 1 - jnp.argmax(possible[..., ::-1], axis=-1)
    return jnp.where(passed.any(axis=-1), jnp.argmax(passed, axis=-1), last)
