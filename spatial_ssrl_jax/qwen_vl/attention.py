"""Attention as pure functions: softmax in fp32, grouped heads, and which keys a token sees.

Shape letters: B rows, T tokens of a row, Q queries, S keys, N query heads, K key/value heads,
M = N/K, H head size, G samples of a group, R response tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: a row without any key stays free of NaN


@dataclass(frozen=True)
class GroupLimits:
    """The largest sizes that a group of a row may have.

    Attributes:
      response: tokens of a response.
      group: tokens of the prompt and all its responses.
    """

    response: int
    group: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visible:
    """Which keys of its row each token sees: those of two intervals, where tokens exist.

    Of `[prompt | response 1 | … | response G]` a response's token sees the prompt and its own
    response up to itself, and a prompt's token the prompt up to itself. Rows hold several such
    groups, one after another.

    Attributes:
      segment: [B, T] int32, which group, prompt or image a token belongs to; -1 is padding, which
        nothing sees and whose results mean nothing.
      first, shared: [B, T] int32, the token sees the keys from `first` to before `shared`,
      own, last: [B, T] int32, and those from `own` to `last`, itself included.
    """

    segment: Array
    first: Array
    shared: Array
    own: Array
    last: Array

    @classmethod
    def in_segments(cls, segment_BT: Array, *, causal: bool) -> "Visible":
        """Tokens see their own segment; with `causal` none after them.

        Args:
          segment_BT: int32, which segment; they ascend, with padding anywhere.
          causal: hides what comes later.
        """
        index = jnp.broadcast_to(jnp.arange(segment_BT.shape[1]), segment_BT.shape)
        first = _latest(_starts(_filled(segment_BT)))
        if causal:
            return cls(segment_BT, first, first, first, index)
        backwards = -_filled(jnp.where(segment_BT < 0, -segment_BT.shape[1], -segment_BT)[:, ::-1])
        last = index.shape[1] - 1 - _latest(_starts(backwards))[:, ::-1]
        return cls(segment_BT, first, first, first, last)

    @classmethod
    def in_groups(cls, segment_BT: Array, response_BT: Array) -> "Visible":
        """Tokens see their prompt and their own response, causally.

        Args:
          segment_BT: int32, which group; they ascend, with padding anywhere but in responses.
          response_BT: int32, which response from 1; 0 is the prompt and padding.
        """
        index = jnp.broadcast_to(jnp.arange(segment_BT.shape[1]), segment_BT.shape)
        starts = _starts(_filled(segment_BT))
        first = _latest(starts)
        before = jnp.where(starts, 0, _before(response_BT))
        is_response = response_BT > 0
        own = jnp.where(is_response, _latest(starts | (response_BT != before)), first)
        shared = jnp.where(is_response, _latest(is_response & (before == 0)), first)
        return cls(segment_BT, first, shared, own, index)

    def to(self, index_S: Array, exists_BS: Array) -> Array:
        """[B, T, S] bool, which of the keys at `index_S` each token sees."""
        first, shared, own, last = (
            x[:, :, None] for x in (self.first, self.shared, self.own, self.last)
        )
        seen = (index_S >= first) & (index_S < shared) | (index_S >= own) & (index_S <= last)
        return seen & exists_BS[:, None]


def _filled(segment_BT: Array) -> Array:
    """Padding as part of the segment before it."""
    return jax.lax.cummax(segment_BT, axis=1)


def _before(x_BT: Array) -> Array:
    """Of each token that of the token before it; the lowest for the first."""
    lowest = jnp.iinfo(x_BT.dtype).min
    return jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0)), constant_values=lowest)


def _starts(segment_BT: Array) -> Array:
    """[B, T] bool, where another segment begins."""
    return segment_BT != _before(segment_BT)


def _latest(is_start_BT: Array) -> Array:
    """[B, T] int32, the index of the latest start up to each token."""
    index = jnp.arange(is_start_BT.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(is_start_BT, index, 0), axis=1)


# Attention of queries [B, Q, N, H] over keys and values [B, K, S, H], seen [B, Q, S] bool.
Block = Callable[[Array, Array, Array, Array], Array]


def attend(
    q_BTNH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    visible: Visible,
    *,
    chunk: int,
    block: Block | None = None,
) -> Array:
    """Attention inside rows.

    Longer rows than `chunk` go one by one, a chunk of queries at a time over a range of keys that
    has all that they see: the work grows with the length of segments, not with that of rows.

    Args:
      q_BTNH, k_BKTH, v_BKTH: queries, keys and values.
      visible: which keys each query sees.
      chunk: queries that attend at a time.
      block: attends; None is `attend_block`.

    Returns:
      [B, T, N, H] in the dtype of `v`.
    """
    block = block or attend_block
    length = q_BTNH.shape[1]
    if length <= chunk:
        seen = visible.to(jnp.arange(length), visible.segment >= 0)
        return block(q_BTNH, k_BKTH, v_BKTH, seen)
    row = partial(_attend_row, chunk=chunk, block=block)
    return jax.lax.map(lambda one: row(*one), (q_BTNH, k_BKTH, v_BKTH, visible))


def _attend_row(
    q_TNH: Array, k_KTH: Array, v_KTH: Array, visible: Visible, *, chunk: int, block: Block
) -> Array:
    """[T, N, H], of one row without its axis."""
    length = q_TNH.shape[0]
    count = -(-length // chunk)
    # Doubling widths of key ranges: a program for each, of which a chunk runs the smallest.
    widths = [chunk * 2**power for power in range(1, 32) if chunk * 2**power < length] + [length]

    def split(x: Array) -> Array:
        padding = ((0, count * chunk - length), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(x, padding).reshape(count, chunk, *x.shape[1:])

    exists = visible.segment >= 0
    queries, of_queries = split(q_TNH), jax.tree.map(split, visible)
    is_query = split(exists)
    begin = jnp.where(is_query, of_queries.first, length).min(axis=1)
    end = jnp.where(is_query, of_queries.last + 1, 0).max(axis=1)

    def over(width: int, q_CNH: Array, of_chunk: Visible, end: Array) -> Array:
        start = jnp.clip(end - width, 0, length - width)
        keys, values = (
            jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)[None] for x in (k_KTH, v_KTH)
        )
        there = jax.lax.dynamic_slice_in_dim(exists, start, width)
        one = jax.tree.map(lambda x: x[None], of_chunk)
        return block(q_CNH[None], keys, values, one.to(start + jnp.arange(width), there[None]))[0]

    @jax.checkpoint
    def attend_chunk(part: tuple[Array, Visible, Array, Array]) -> Array:
        q_CNH, of_chunk, begin, end = part
        smallest = sum((end - begin > width).astype(jnp.int32) for width in widths[:-1])
        choices = [partial(over, width) for width in widths]
        return jax.lax.switch(smallest, choices, q_CNH, of_chunk, end)

    out = jax.lax.map(attend_chunk, (queries, of_queries, begin, end))
    return out.reshape(count * chunk, *out.shape[2:])[:length]


def attend_block(q_BQNH: Array, k_BKSH: Array, v_BKSH: Array, seen_BQS: Array) -> Array:
    """Attention with all scores at once.

    Args:
      q_BQNH, k_BKSH, v_BKSH: queries, keys and values.
      seen_BQS: bool, which keys each query sees.

    Returns:
      [B, Q, N, H] in the dtype of `v`.
    """
    batch, queries, _, size = q_BQNH.shape
    q_BQKMH = q_BQNH.reshape(batch, queries, k_BKSH.shape[1], -1, size)
    scores = _scores("bqkmh,bksh->bkmqs", q_BQKMH, k_BKSH)
    weights = jax.nn.softmax(jnp.where(seen_BQS[:, None, None], scores, NEVER), axis=-1)
    out = jnp.einsum("bkmqs,bksh->bqkmh", weights.astype(v_BKSH.dtype), v_BKSH)
    return out.reshape(q_BQNH.shape)


def attend_shared(
    q_BGQNH: Array,
    prefix_k_BKTH: Array,
    prefix_v_BKTH: Array,
    prefix_valid_BT: Array,
    own_k_BGKRH: Array,
    own_v_BGKRH: Array,
    own_seen_BGQR: Array,
) -> Array:
    """Queries of G samples over the prompt they share and over each sample's own tokens.

    The scores of all G·Q·M query rows against the prompt are one matmul, and one softmax
    runs over prompt and own tokens together.

    Args:
      q_BGQNH: queries of every sample.
      prefix_k_BKTH, prefix_v_BKTH: the prompt's keys and values, once a group.
      prefix_valid_BT: bool, which prompt tokens exist.
      own_k_BGKRH, own_v_BGKRH: keys and values of each sample's own tokens.
      own_seen_BGQR: bool, which own tokens each query may see.

    Returns:
      [B, G, Q, N, H] in the dtype of the values.
    """
    batch, group, queries, _, size = q_BGQNH.shape
    q = q_BGQNH.reshape(batch, group, queries, prefix_k_BKTH.shape[1], -1, size)

    # Each matmul keeps the axis order of its cache, else a decode step copies the caches.
    prefix = _scores("bgqkmh,bkth->bkgmqt", q, prefix_k_BKTH)
    prefix = jnp.where(prefix_valid_BT[:, None, None, None, None], prefix, NEVER)
    own = _scores("bgqkmh,bgkrh->bgkmqr", q, own_k_BGKRH)
    own = jnp.where(own_seen_BGQR[:, :, None, None], own, NEVER)
    top = jnp.maximum(_by_head(prefix.max(-1, keepdims=True)), own.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    prefix, own = jnp.exp(prefix - _by_head(top)), jnp.exp(own - top)
    total = _by_head(prefix.sum(-1, keepdims=True)) + own.sum(-1, keepdims=True)
    prefix = (prefix / _by_head(total)).astype(prefix_v_BKTH.dtype)
    mixed = _by_head(jnp.einsum("bkgmqt,bkth->bkgmqh", prefix, prefix_v_BKTH))
    own = (own / total).astype(own_v_BGKRH.dtype)
    mixed += jnp.einsum("bgkmqr,bgkrh->bgkmqh", own, own_v_BGKRH)
    return jnp.moveaxis(mixed, 4, 2).reshape(q_BGQNH.shape)


def _by_head(x: Array) -> Array:
    """[B, K, G, ...] from [B, G, K, ...], or back."""
    return x.swapaxes(1, 2)


def _scores(letters: str, q: Array, k: Array) -> Array:
    scores = jnp.einsum(letters, q, k, preferred_element_type=jnp.float32)
    return scores * q.shape[-1] ** -0.5
