"""Attention of one decode step as one GPU kernel (Pallas, by way of Triton).

A program holds the queries of a whole group for one key/value head (of a part of it where the group
is large), so that the prompt's keys and values are read once a group and no score leaves the chip.
It begins with each sample's newest token, continues with the prompt, then with the samples' own slots
as far as they are written.

Shape letters: B groups, G samples, K key/value heads, M query heads of each, P = M + 2 with key and
value, H head size, T prompt tokens, R slots, Q query rows of a program, a power of two.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.attention import NEVER

_BLOCK = 64  # keys at a time
_WARPS, _STAGES = 4, 3
_SIZES = (16, 32, 64, 128)
_MIN, _MAX = 16, 64  # query rows: of Triton's smallest product, and what registers hold


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
      qkv_BGKPH: each sample's query heads of a key/value head, its key and its value, not rotated.
      cos_BH, sin_BH: [B, H/2] float32, the angles of the token's position.
      prefix_k_BKTH, prefix_v_BKTH: the prompts' keys and values, once a group.
      prefix_length_B: int32 tokens of each prompt.
      own_k_BGKRH, own_v_BGKRH: keys and values of each sample's own tokens; used up.
      cursor: int32, the slot to write; later ones are not read.
      interpret: run the kernel step by step, to check it where there is no GPU.

    Returns:
      [B, G, K·M, H] in the dtype of the values, and the own keys and values with the token's.

    Raises:
      UserError: Triton has no product of this head size.
    """
    batch, group, heads, parts, size = qkv_BGKPH.shape
    if not interpret and size not in _SIZES:
        raise UserError(
            f"the kernel of decode steps takes heads of {', '.join(map(str, _SIZES))}, and these "
            f"are of {size}: set rollout.attention=xla."
        )
    prompt, slots, each = prefix_k_BKTH.shape[2], own_k_BGKRH.shape[3], parts - 2
    samples = min(group, max(1, _MAX // each))

    def of_group(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, group, None, count, size), lambda b, k, _: (b, 0, k, 0, 0))

    angles = pl.BlockSpec((None, size // 2), lambda b, *_: (b, 0))
    shared = pl.BlockSpec((None, None, prompt, size), lambda b, k, _: (b, k, 0, 0))
    length, place = pl.BlockSpec((None,), lambda b, *_: (b,)), pl.BlockSpec((), lambda *_: ())
    own = of_group(slots)
    out_shape = (batch, group, heads, each, size)
    out, own_k_BGKRH, own_v_BGKRH = pl.pallas_call(
        partial(_kernel, each=each, group=group, samples=samples),
        grid=(batch, heads, pl.cdiv(group, samples)),
        in_specs=[of_group(parts), angles, angles, shared, shared, length, own, own, place],
        out_specs=[of_group(each), own, own],
        out_shape=[
            jax.ShapeDtypeStruct(out_shape, prefix_v_BKTH.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (own_k_BGKRH, own_v_BGKRH)),
        ],
        input_output_aliases={6: 1, 7: 2},
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="attend_step",
    )(
        *(qkv_BGKPH, cos_BH, sin_BH),
        *(prefix_k_BKTH, prefix_v_BKTH, prefix_length_B),
        *(own_k_BGKRH, own_v_BGKRH, cursor),
    )
    return out.reshape(batch, group, heads * each, size), own_k_BGKRH, own_v_BGKRH


def _kernel(
    qkv_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    prefix_k_ref: Any,
    prefix_v_ref: Any,
    length_ref: Any,
    own_k_ref: Any,
    own_v_ref: Any,
    cursor_ref: Any,
    out_ref: Any,
    new_k_ref: Any,
    new_v_ref: Any,
    *,
    each: int,
    group: int,
    samples: int,
) -> None:
    """One key/value head and `samples` of a group: row i is of the i // `each`-th of them."""
    size = qkv_ref.shape[-1]
    first = pl.program_id(2) * samples
    count = jnp.minimum(group - first, samples)
    # Rows that are too many do again what the last one does, and write the same.
    row = jnp.arange(max(_MIN, pl.next_power_of_2(samples * each)))
    row = jnp.minimum(row, count * each - 1)[:, None]
    sample_Q, head_Q = first + row // each, row % each
    column = jnp.arange(size)[None]
    turn = column % (size // 2)
    cos, sin = plgpu.load(cos_ref.at[turn]), plgpu.load(sin_ref.at[turn])
    sin = jnp.where(column < size // 2, -sin, sin)
    cursor = cursor_ref[...]

    def rotated(part: Array | int) -> Array:
        here = plgpu.load(qkv_ref.at[sample_Q, part, column]).astype(jnp.float32)
        across = plgpu.load(qkv_ref.at[sample_Q, part, (column + size // 2) % size])
        return (here * cos + across.astype(jnp.float32) * sin).astype(qkv_ref.dtype)

    q_QH, k_QH = rotated(head_Q), rotated(each)
    v_QH = plgpu.load(qkv_ref.at[sample_Q, each + 1, column])
    plgpu.store(new_k_ref.at[sample_Q, cursor, column], k_QH)
    plgpu.store(new_v_ref.at[sample_Q, cursor, column], v_QH)

    place = jnp.arange(_BLOCK)
    length = length_ref[...]
    blocks = pl.cdiv(cursor, _BLOCK)

    def of_prompt(i, carry):
        at = (pl.ds(i * _BLOCK, _BLOCK), slice(None))
        here = i * _BLOCK + place < length
        return _visit(q_QH, prefix_k_ref.at[at], prefix_v_ref.at[at], here, None, carry)

    def of_sample(i, carry):
        sample, begin = first + i // blocks, i % blocks * _BLOCK
        at = (sample, pl.ds(begin, _BLOCK), slice(None))
        here = begin + place < cursor
        own = sample_Q == sample
        return _visit(q_QH, own_k_ref.at[at], own_v_ref.at[at], here, own, carry)

    newest_Q = jnp.sum(q_QH.astype(jnp.float32) * k_QH.astype(jnp.float32), axis=1) * size**-0.5
    carry = (v_QH.astype(jnp.float32), newest_Q, jnp.ones_like(newest_Q))
    carry = jax.lax.fori_loop(0, pl.cdiv(length, _BLOCK), of_prompt, carry)
    out_QH, _, whole_Q = jax.lax.fori_loop(0, count * blocks, of_sample, carry)
    out_QH = (out_QH / whole_Q[:, None]).astype(out_ref.dtype)
    plgpu.store(out_ref.at[sample_Q, head_Q, column], out_QH)


def _visit(
    q_QH: Array,
    k_ref: Any,
    v_ref: Any,
    here: Array,
    own: Array | None,
    carry: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """Goes on with the softmax over a block of keys.

    Args:
      q_QH: queries.
      k_ref, v_ref: the block's keys and values.
      here: [block] bool, which of them count.
      own: [Q, 1] bool, the queries that see them; None for all.
      carry: weighted sum of the values, largest score, and sum of the weights so far.
    """
    out_QH, top_Q, whole_Q = carry
    k = plgpu.load(k_ref, mask=here[:, None], other=0.0)
    scores = plgpu.dot(q_QH, k.T) * q_QH.shape[-1] ** -0.5
    scores = jnp.where(here[None] if own is None else here[None] & own, scores, NEVER)
    higher_Q = jnp.maximum(top_Q, scores.max(axis=1))
    weights, shrink_Q = jnp.exp(scores - higher_Q[:, None]), jnp.exp(top_Q - higher_Q)
    v = plgpu.load(v_ref, mask=here[:, None], other=0.0)
    out_QH = out_QH * shrink_Q[:, None] + plgpu.dot(weights.astype(v.dtype), v)
    return out_QH, higher_Q, whole_Q * shrink_Q + weights.sum(axis=1)
