"""Attention as pure functions: softmax in fp32, grouped heads, and a prompt shared by its group.

Shape letters: B rows, Q queries, S keys, N query heads, K key/value heads, M = N/K, H head size,
G samples of a group, T prompt tokens, R response tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

NEVER = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: a row without any key stays free of NaN


def attend(
    q_BQNH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    segment_BQ: Array,
    segment_BS: Array,
    *,
    causal: bool,
    chunk: int,
) -> Array:
    """Attention inside segments: a query sees the keys of its own segment, none of segment -1.

    Args:
      q_BQNH: queries; with `causal`, query i is at key i.
      k_BKSH, v_BKSH: keys and values.
      segment_BQ, segment_BS: int32 segment of each query and key; -1 is padding.
      causal: also hide keys after the query.
      chunk: queries that attend at a time, so that the scores of all never exist at once.

    Returns:
      [B, Q, N, H] in the dtype of `v`.
    """
    batch, queries, heads, size = q_BQNH.shape
    q_BQKMH = q_BQNH.reshape(batch, queries, k_BKSH.shape[1], -1, size)
    index_S = jnp.arange(k_BKSH.shape[2])

    def block(q_BCKMH: Array, segment_BC: Array, index_C: Array) -> Array:
        seen = (segment_BC[:, :, None] == segment_BS[:, None]) & (segment_BS[:, None] >= 0)
        if causal:
            seen &= index_C[:, None] >= index_S
        scores = _scores("bqkmh,bksh->bkmqs", q_BCKMH, k_BKSH)
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, NEVER), axis=-1)
        return jnp.einsum("bkmqs,bksh->bqkmh", weights.astype(v_BKSH.dtype), v_BKSH)

    index_Q = jnp.arange(queries)
    if queries <= chunk:
        out = block(q_BQKMH, segment_BQ, index_Q)
    else:
        out = _over_queries(block, chunk, (1, 1, 0), 1, q_BQKMH, segment_BQ, index_Q)
    return out.reshape(q_BQNH.shape)


def attend_shared(
    q_BGQNH: Array,
    prefix_k_BKTH: Array,
    prefix_v_BKTH: Array,
    prefix_valid_BT: Array,
    own_k_BGKRH: Array,
    own_v_BGKRH: Array,
    own_seen_BGQR: Array,
    *,
    chunk: int,
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
      chunk: queries of a sample that attend at a time.

    Returns:
      [B, G, Q, N, H] in the dtype of the values.
    """
    batch, group, queries, _, size = q_BGQNH.shape
    q = q_BGQNH.reshape(batch, group, queries, prefix_k_BKTH.shape[1], -1, size)

    def block(q: Array, seen_BGQR: Array) -> Array:
        # Each matmul keeps the axis order of its cache, else a decode step copies the caches.
        prefix = _scores("bgqkmh,bkth->bkgmqt", q, prefix_k_BKTH)
        prefix = jnp.where(prefix_valid_BT[:, None, None, None, None], prefix, NEVER)
        own = _scores("bgqkmh,bgkrh->bgkmqr", q, own_k_BGKRH)
        own = jnp.where(seen_BGQR[:, :, None, None], own, NEVER)
        top = jnp.maximum(_by_head(prefix.max(-1, keepdims=True)), own.max(-1, keepdims=True))
        top = jax.lax.stop_gradient(top)
        prefix, own = jnp.exp(prefix - _by_head(top)), jnp.exp(own - top)
        total = _by_head(prefix.sum(-1, keepdims=True)) + own.sum(-1, keepdims=True)
        prefix = (prefix / _by_head(total)).astype(prefix_v_BKTH.dtype)
        mixed = _by_head(jnp.einsum("bkgmqt,bkth->bkgmqh", prefix, prefix_v_BKTH))
        own = (own / total).astype(own_v_BGKRH.dtype)
        mixed += jnp.einsum("bgkmqr,bgkrh->bgkmqh", own, own_v_BGKRH)
        return jnp.moveaxis(mixed, 4, 2)

    if queries <= chunk:
        out = block(q, own_seen_BGQR)
    else:
        out = _over_queries(block, chunk, (2, 2), 2, q, own_seen_BGQR)
    return out.reshape(q_BGQNH.shape)


def _by_head(x: Array) -> Array:
    """[B, K, G, ...] from [B, G, K, ...], or back."""
    return x.swapaxes(1, 2)


def _scores(letters: str, q: Array, k: Array) -> Array:
    scores = jnp.einsum(letters, q, k, preferred_element_type=jnp.float32)
    return scores * q.shape[-1] ** -0.5


def _over_queries(
    block: Callable[..., Array],
    chunk: int,
    axes: tuple[int, ...],
    out_axis: int,
    *arrays: Array,
) -> Array:
    """`block` over slices of `chunk` along each array's query axis, one slice at a time.

    Each slice is rematerialised in the backward pass; a shorter last one is padded, and the
    padding dropped.
    """
    queries = arrays[0].shape[axes[0]]
    count = -(-queries // chunk)

    def split(x: Array, axis: int) -> Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, count * chunk - queries)
        x = jnp.pad(x, pad)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1 :]), axis, 0)

    chunks = tuple(split(x, axis) for x, axis in zip(arrays, axes, strict=True))
    out = jax.lax.map(jax.checkpoint(lambda one: block(*one)), chunks)
    out = jnp.moveaxis(out, 0, out_axis)
    out = out.reshape(*out.shape[:out_axis], count * chunk, *out.shape[out_axis + 2 :])
    return jax.lax.slice_in_dim(out, 0, queries, axis=out_axis)
