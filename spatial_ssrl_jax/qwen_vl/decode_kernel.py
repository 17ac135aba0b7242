"""Attention of one decode step as one GPU kernel (Pallas, by way of Triton).

A program holds the queries of a whole group for one key/value head (of a part of the group where it
is large), so that the prompt's keys and values are read once a group and no score leaves the chip.
It runs over each sample's newest token, then over the prompt, then over the written slots of the
samples.

Shape letters: B groups, G samples, K key/value heads, M query heads of each, P = M + 2 with key and
value, H head size, T prompt tokens, R slots, Q query rows of a program, a power of two.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.ref import AbstractRef, Ref

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.attention import NEVER

# Of an online softmax: weighted sum of the values, largest score, and sum of the weights so far.
Softmax = tuple[Array, Array, Array]

_BLOCK = 64  # keys at a time
_WARPS, _STAGES = 4, 3
_HEAD_SIZES = (16, 32, 64, 128)
_MIN_ROWS, _MAX_ROWS = 16, 64  # query rows: of Triton's smallest matmul, and what registers hold


def attend_decode(
    qkv_BGKPH: Array,
    cos_BH: Array,
    sin_BH: Array,
    prefix_k_BKTH: Array,
    prefix_v_BKTH: Array,
    prefix_length_B: Array,
    own_k_BGKRH: Array,
    own_v_BGKRH: Array,
    cursor: Array,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Rotates a token's queries and key, writes key and value, and attends, on one device.

    Args:
      qkv_BGKPH: the query heads, the key and the value of each key/value head, before rotation.
      cos_BH, sin_BH: [B, H/2] float32, the angles of the token's position.
      prefix_k_BKTH, prefix_v_BKTH: the prompts' keys and values, once a group.
      prefix_length_B: int32 tokens of each prompt.
      own_k_BGKRH, own_v_BGKRH: keys and values of each sample's own tokens; donated.
      cursor: int32, the slot to write; later ones are not read.
      interpret: run the kernel in interpret mode, to check it without a GPU.

    Returns:
      [B, G, K·M, H] in the dtype of the values, and the new own keys and values.

    Raises:
      UserError: Triton has no matmul of this head size.
    """
    batch, group, heads, packed, size = qkv_BGKPH.shape
    if not interpret and size not in _HEAD_SIZES:
        raise UserError(
            f"the decode kernel takes heads of size {', '.join(map(str, _HEAD_SIZES))}, and these "
            f"are of {size}: set rollout.attention=xla."
        )
    prompt, slots, queries = prefix_k_BKTH.shape[2], own_k_BGKRH.shape[3], packed - 2
    samples = min(group, max(1, _MAX_ROWS // queries))

    def of_group(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, group, None, count, size), lambda b, k, _: (b, 0, k, 0, 0))

    angles = pl.BlockSpec((None, size // 2), lambda b, *_: (b, 0))
    shared = pl.BlockSpec((None, None, prompt, size), lambda b, k, _: (b, k, 0, 0))
    length, scalar = pl.BlockSpec((None,), lambda b, *_: (b,)), pl.BlockSpec((), lambda *_: ())
    own = of_group(slots)
    out_shape = (batch, group, heads, queries, size)
    out, own_k_BGKRH, own_v_BGKRH = pl.pallas_call(
        partial(_kernel, queries=queries, group=group, samples=samples),
        grid=(batch, heads, pl.cdiv(group, samples)),
        in_specs=[of_group(packed), angles, angles, shared, shared, length, own, own, scalar],
        out_specs=[of_group(queries), own, own],
        out_shape=[
            jax.ShapeDtypeStruct(out_shape, prefix_v_BKTH.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (own_k_BGKRH, own_v_BGKRH)),
        ],
        input_output_aliases={6: 1, 7: 2},
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="attend_decode",
    )(
        *(qkv_BGKPH, cos_BH, sin_BH),
        *(prefix_k_BKTH, prefix_v_BKTH, prefix_length_B),
        *(own_k_BGKRH, own_v_BGKRH, cursor),
    )
    return out.reshape(batch, group, heads * queries, size), own_k_BGKRH, own_v_BGKRH


def _kernel(
    qkv_ref: Ref,
    cos_ref: Ref,
    sin_ref: Ref,
    prefix_k_ref: Ref,
    prefix_v_ref: Ref,
    length_ref: Ref,
    own_k_ref: Ref,
    own_v_ref: Ref,
    cursor_ref: Ref,
    out_ref: Ref,
    new_k_ref: Ref,
    new_v_ref: Ref,
    *,
    queries: int,
    group: int,
    samples: int,
) -> None:
    """One key/value head and `samples` of a group: query row i is of sample i // `queries`."""
    size = qkv_ref.shape[-1]
    first = pl.program_id(2) * samples
    count = jnp.minimum(group - first, samples)
    # Rows of padding repeat the last one, and write the same.
    row = jnp.arange(max(_MIN_ROWS, pl.next_power_of_2(samples * queries)))
    row = jnp.minimum(row, count * queries - 1)[:, None]
    sample_Q, head_Q = first + row // queries, row % queries
    column = jnp.arange(size)[None]
    angle = column % (size // 2)
    cos, sin = plgpu.load(cos_ref.at[angle]), plgpu.load(sin_ref.at[angle])
    sin = jnp.where(column < size // 2, -sin, sin)
    cursor = cursor_ref[...]

    def rotated(head: Array | int) -> Array:
        x = plgpu.load(qkv_ref.at[sample_Q, head, column]).astype(jnp.float32)
        other_half = plgpu.load(qkv_ref.at[sample_Q, head, (column + size // 2) % size])
        return (x * cos + other_half.astype(jnp.float32) * sin).astype(qkv_ref.dtype)

    q_QH, k_QH = rotated(head_Q), rotated(queries)
    v_QH = plgpu.load(qkv_ref.at[sample_Q, queries + 1, column])
    plgpu.store(new_k_ref.at[sample_Q, cursor, column], k_QH)
    plgpu.store(new_v_ref.at[sample_Q, cursor, column], v_QH)

    offset = jnp.arange(_BLOCK)
    length = length_ref[...]
    blocks = pl.cdiv(cursor, _BLOCK)

    def visit_prompt(i: Array, carry: Softmax) -> Softmax:
        at = (pl.ds(i * _BLOCK, _BLOCK), slice(None))
        valid = i * _BLOCK + offset < length
        return _visit(q_QH, prefix_k_ref.at[at], prefix_v_ref.at[at], valid, None, carry)

    def visit_sample(i: Array, carry: Softmax) -> Softmax:
        sample, start = first + i // blocks, i % blocks * _BLOCK
        at = (sample, pl.ds(start, _BLOCK), slice(None))
        valid = start + offset < cursor
        own = sample_Q == sample
        return _visit(q_QH, own_k_ref.at[at], own_v_ref.at[at], valid, own, carry)

    newest_Q = jnp.sum(q_QH.astype(jnp.float32) * k_QH.astype(jnp.float32), axis=1) * size**-0.5
    carry = (v_QH.astype(jnp.float32), newest_Q, jnp.ones_like(newest_Q))
    carry = jax.lax.fori_loop(0, pl.cdiv(length, _BLOCK), visit_prompt, carry)
    out_QH, _, sum_Q = jax.lax.fori_loop(0, count * blocks, visit_sample, carry)
    out_QH = (out_QH / sum_Q[:, None]).astype(out_ref.dtype)
    plgpu.store(out_ref.at[sample_Q, head_Q, column], out_QH)


def _visit(
    q_QH: Array,
    k_ref: AbstractRef,
    v_ref: AbstractRef,
    valid: Array,
    own: Array | None,
    carry: Softmax,
) -> Softmax:
    """Extends the online softmax by a block of keys.

    Args:
      q_QH: queries.
      k_ref, v_ref: the block's keys and values.
      valid: [block] bool, which of them count.
      own: [Q, 1] bool, the queries that see them; None for all.
      carry: the softmax so far.
    """
    out_QH, max_Q, sum_Q = carry
    k = plgpu.load(k_ref, mask=valid[:, None], other=0.0)
    scores = plgpu.dot(q_QH, k.T) * q_QH.shape[-1] ** -0.5
    scores = jnp.where(valid[None] if own is None else valid[None] & own, scores, NEVER)
    new_max_Q = jnp.maximum(max_Q, scores.max(axis=1))
    weights, rescale_Q = jnp.exp(scores - new_max_Q[:, None]), jnp.exp(max_Q - new_max_Q)
    v = plgpu.load(v_ref, mask=valid[:, None], other=0.0)
    out_QH = out_QH * rescale_Q[:, None] + plgpu.dot(weights.astype(v.dtype), v)
    return out_QH, new_max_Q, sum_Q * rescale_Q + weights.sum(axis=1)
