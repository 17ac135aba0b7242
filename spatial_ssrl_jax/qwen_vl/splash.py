"""Splash attention, the fused TPU kernel of JAX's Pallas library.

The library skips blocks that a static mask hides. Rows of packed groups differ from one
micro-batch to the next: here lists of their visible blocks, computed on the device, take the place
of the static ones.

Shape letters: B rows, T tokens, N query heads, K key/value heads, H head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as infos
from jax.sharding import PartitionSpec as P

from spatial_ssrl_jax.qwen_vl.attention import GroupLimits, Visible
from spatial_ssrl_jax.qwen_vl.compute import AttentionKernel
from spatial_ssrl_jax.qwen_vl.layers import ATTENDED

_LANES = 128  # a block is a multiple of these
_BLOCKS = (512, 256, _LANES)  # tokens of a block, the fastest first
_MAX_PADDING = 1 / 8  # largest fraction of a row that is padded for the sake of a larger block
_BITS = 32  # of what the kernel knows of a query
MAX_ROW_TOKENS = 2**16  # of a row with groups, as those bits allow
BLOCKS_RUN = "splash_blocks_"  # a call's scope, with the blocks of a row and head that it computes


@dataclass(frozen=True)
class QueryBits:
    """How the bits of a query's integer are shared out.

    Attributes:
      index: bits of its index in the row.
      offset: bits of its distance from the first token of its own response.
      alignment: the index from which the response's own keys are hidden is a multiple of it.
    """

    index: int
    offset: int
    alignment: int

    @classmethod
    def of(cls, tokens: int, longest_response: int) -> "QueryBits":
        """For rows of so many tokens."""
        index, offset = (tokens - 1).bit_length(), (longest_response - 1).bit_length()
        alignment = 1 << max(0, 2 * index + offset - _BITS)
        return cls(index, max(offset, (alignment - 1).bit_length()), alignment)

    def pack(self, visible: Visible) -> Array:
        """[B, T] int32."""
        index, high = visible.last.astype(jnp.uint32), _BITS - self.index - self.offset
        offset = index - visible.own.astype(jnp.uint32)
        # A prompt's token sees all keys of its group up to itself: those below the largest
        # `shared`, which may miss the end of the row, and as its own those close to it.
        is_prompt = visible.own == visible.first
        shared = visible.shared.astype(jnp.uint32) // self.alignment
        shared = jnp.where(is_prompt, (1 << high) - 1, shared)
        offset = jnp.minimum(offset, (1 << self.offset) - 1)
        packed = index | offset << self.index | shared << (self.index + self.offset)
        return jax.lax.bitcast_convert_type(packed, jnp.int32)

    def sees(self, query: Any, key: Any) -> Any:
        """Whether a query sees a key of its group."""
        index = query & ((1 << self.index) - 1)
        own = index - ((query >> self.index) & ((1 << self.offset) - 1))
        high = _BITS - self.index - self.offset
        shared = ((query >> (self.index + self.offset)) & ((1 << high) - 1)) * self.alignment
        return (key <= index) & ((key < shared) | (key >= own))


class GroupMask(masks._ComputableMask):
    """What `QueryBits.sees`, as the library takes it."""

    def __init__(self, shape: tuple[int, int], bits: QueryBits):
        self._key = (shape, bits)
        super().__init__(shape, bits.sees)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash((GroupMask, self._key))


def response_alignment(tokens: int, longest_response: int) -> int:
    """The first response of each group of a row starts at a multiple of it, for `attend_splash`.

    Args:
      tokens: of a row.
      longest_response: tokens of a response at most.
    """
    return QueryBits.of(_padded(tokens)[0], longest_response).alignment


def attend_splash(
    q_BTNH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    visible: Visible,
    kernel: AttentionKernel,
    *,
    causal: bool,
    limits: GroupLimits | None = None,
) -> Array:
    """Attention inside rows.

    Args:
      q_BTNH, k_BKTH, v_BKTH: queries, keys and values.
      visible: which keys each query sees.
      kernel: the mesh and the axes that rows and heads are sharded over.
      causal: a token sees none after it.
      limits: of the row's groups; None where a causal row is one segment with padding after it.

    Returns:
      [B, T, N, H] in the dtype of `v`; of padding it means nothing.
    """
    length, heads, size = q_BTNH.shape[1:]
    padded, block = _padded(length)
    padding = [(0, 0), (0, padded - length)]
    q = (q_BTNH.astype(jnp.float32) * size**-0.5).astype(q_BTNH.dtype).swapaxes(1, 2)
    q, k, v = (jnp.pad(x, ((0, 0), *padding, (0, 0))) for x in (q, k_BKTH, v_BKTH))
    visible = jax.tree.map(lambda x: jnp.pad(x, padding, constant_values=-1), visible)
    mesh = kernel.mesh if kernel.mesh is not None and kernel.mesh.size > 1 else None
    shards = mesh.shape[kernel.heads] if mesh else 1
    if causal and limits is None:
        mask = masks.CausalMask((padded, padded))
        run, blocks = _program(mask, heads // shards, block, kernel.interpret)
        row = partial(_attend_static, run)
    else:
        assert limits is None or padded <= MAX_ROW_TOKENS  # refused by `row_shapes`
        bits = QueryBits.of(padded, limits.response) if limits else None
        mask = GroupMask((block, block), bits) if bits else masks.FullMask((block, block))
        run, _ = _program(mask, heads // shards, block, kernel.interpret)
        span = limits.group if limits else padded
        width = min(padded // block, -(-span // block) + 1)
        # A query sees half of its group or image, about; the kernel runs no other blocks.
        blocks = -(-padded // block * (width + 1) // 2)
        row = partial(_attend_listed, run, bits, block, width)

    def on_shard(q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, visible: Visible) -> Array:
        with jax.named_scope(f"{BLOCKS_RUN}{blocks}"):
            return row(q_BNTH, k_BKTH, v_BKTH, visible)

    if mesh:
        if k.shape[1] % shards:  # fewer key heads than shards: each shard has the one it needs
            k, v = (jnp.repeat(x, shards // x.shape[1], axis=1) for x in (k, v))
        spec, rows = P(kernel.rows, kernel.heads), P(kernel.rows)
        on_shard = jax.shard_map(
            on_shard, mesh=mesh, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False
        )
    return on_shard(q, k, v, visible)[:, :, :length].swapaxes(1, 2)


def _attend_static(
    run: Callable[..., Any], q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, visible: Visible
) -> Array:
    ids = splash.SegmentIds(visible.segment, visible.segment)
    return jax.vmap(run)(q_BNTH, k_BKTH, v_BKTH, ids)


def _attend_listed(
    run: splash.SplashAttentionKernel,
    bits: QueryBits | None,
    block: int,
    width: int,
    q_BNTH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    visible: Visible,
) -> Array:
    """The kernel over lists of visible blocks, a row at a time."""
    queries = bits.pack(visible) if bits else None
    tiles = visible_blocks(visible, block)
    forward, backward = _lists(tiles, width), _lists(tiles.swapaxes(1, 2), width)
    backward = jax.tree.map(lambda x: x.swapaxes(1, 2), backward)
    no_masks = dict(mask_next=None, partial_mask_blocks=None)

    def row(one: tuple[Any, ...]) -> Array:
        q, k, v, segment, queries, forward, backward = one
        of_query, of_key = (
            infos.MaskInfo(x[0][None], block_mask=x[1][None], q_sequence=queries, **no_masks)
            for x in (forward, backward)
        )
        kernel = splash.SplashAttentionKernel(of_query, of_query, of_key, **run.kwargs)
        out = kernel(q, k, v, splash.SegmentIds(segment, segment))
        assert isinstance(out, Array)  # a tuple only with `save_residuals`
        return out

    arrays = (q_BNTH, k_BKTH, v_BKTH, visible.segment, queries, forward, backward)
    return jax.lax.map(row, arrays)


def visible_blocks(visible: Visible, block: int) -> Array:
    """[B, T/block, T/block] bool, where a query of a block sees a key of another.

    The diagonal is always there, as the kernel is not defined without any key.
    """
    batch, length = visible.segment.shape
    count = length // block
    start = jnp.arange(count) * block
    first, shared, own, last, exists = (
        x[:, :, None]
        for x in (visible.first, visible.shared, visible.own, visible.last, visible.segment >= 0)
    )
    end = start + block
    seen = (first < end) & (shared > start) | (own < end) & (last >= start)
    return (seen & exists).reshape(batch, count, block, count).any(axis=2) | jnp.eye(
        count, dtype=bool
    )


def _lists(tiles: Array, width: int) -> tuple[Array, Array]:
    """The indices of each row's true values, and which of the [.., width] places are filled.

    Unfilled places repeat the last index, so that the kernel fetches nothing anew.
    """
    order = jnp.argsort(~tiles, axis=-1, stable=True)[..., :width].astype(jnp.int32)
    count = tiles.sum(axis=-1, keepdims=True)
    place = jnp.minimum(jnp.arange(width), count - 1)
    filled = (jnp.arange(width) < count).astype(jnp.int32)
    return jnp.take_along_axis(order, place, axis=-1), filled


def _padded(length: int) -> tuple[int, int]:
    """The padded length of a row, and of its blocks, in tokens."""
    sizes = [(-(-length // block) * block, block) for block in _BLOCKS]
    return next((s for s in sizes if s[0] - length <= _MAX_PADDING * length), sizes[-1])


@cache
def _program(
    mask: masks.Mask, heads: int, block: int, interpret: bool
) -> tuple[splash.SplashAttentionKernel, int]:
    """The kernel for one row, and how many blocks of a head are not masked completely."""
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENDED,
            interpret=interpret,
        )
    # NumPy arrays belong to no device, so that any program can hold them.
    kernel = jax.tree.map(np.asarray, kernel)
    blocks = kernel.fwd_mask_info.block_mask
    every = (mask.shape[0] // block) ** 2
    return kernel, every if blocks is None else int((blocks[0] > 0).sum())
