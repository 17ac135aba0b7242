"""Splash attention, the fused TPU kernel of JAX's Pallas library, and the mask of a whole group.

Shape letters: B rows, T tokens, N query heads, K key/value heads, H head size.
"""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from spatial_ssrl_jax.qwen_vl.compute import AttentionKernel
from spatial_ssrl_jax.qwen_vl.layers import ATTENDED

_LANES = 128  # a block is a multiple of these
_BLOCKS = (512, 256, _LANES)  # tokens of a block, the fastest first
_MAX_PADDING = 1 / 8  # largest fraction of a row that is padded for the sake of a larger block
BLOCKS_RUN = "splash_blocks_"  # a call's scope, with the blocks of a row and head that it computes


class GroupMask(masks._ComputableMask):
    """Which tokens each of `[prompt | response 1 | … | response G | padding]` sees."""

    def __init__(self, shape: tuple[int, int], prompt: int, response: int, group: int):
        self._key = (shape, prompt, response, group)

        def seen(query: Array, key: Array) -> Array:
            # The start of the query's response, without a division: the kernel has no fast one.
            later = [prompt + i * response for i in range(1, group)]
            start = prompt + response * sum((query >= at) * 1 for at in later)
            return (query >= key) & ((key < prompt) | (key >= start))

        super().__init__(shape, seen)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash((GroupMask, self._key))


CAUSAL, FULL = masks.CausalMask, masks.FullMask


def attend_splash(
    q_BTNH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    segment_BT: Array,
    mask: Callable[[tuple[int, int]], masks.Mask],
    kernel: AttentionKernel,
) -> Array:
    """Attention under a static mask, inside segments.

    Args:
      q_BTNH, k_BKTH, v_BKTH: queries, keys and values.
      segment_BT: int32 segment of each token; -1 is padding, whose results are undefined.
      mask: makes the mask of a padded length.
      kernel: the mesh and the axes that rows and heads are sharded over.

    Returns:
      [B, T, N, H] in the dtype of `v`.
    """
    length, heads, size = q_BTNH.shape[1:]
    padded, block = _padded(length)
    padding = [(0, 0), (0, padded - length)]
    q = (q_BTNH.astype(jnp.float32) * size**-0.5).astype(q_BTNH.dtype).swapaxes(1, 2)
    q, k, v = (jnp.pad(x, ((0, 0), *padding, (0, 0))) for x in (q, k_BKTH, v_BKTH))
    segment_BT = jnp.pad(segment_BT, padding, constant_values=-1)
    mesh = kernel.mesh if kernel.mesh is not None and kernel.mesh.size > 1 else None
    shards = mesh.shape[kernel.heads] if mesh else 1
    run, blocks = _program(mask((padded, padded)), heads // shards, block, kernel.interpret)

    def on_shard(q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, segment_BT: Array) -> Array:
        with jax.named_scope(f"{BLOCKS_RUN}{blocks}"):
            ids = splash.SegmentIds(segment_BT, segment_BT)
            out = jax.vmap(run)(q_BNTH, k_BKTH, v_BKTH, ids)
        assert isinstance(out, Array)  # a tuple only with `save_residuals`
        return out

    if mesh:
        if k.shape[1] % shards:  # fewer key heads than shards: each shard has the one it needs
            k, v = (jnp.repeat(x, shards // x.shape[1], axis=1) for x in (k, v))
        spec, rows = P(kernel.rows, kernel.heads), P(kernel.rows)
        on_shard = jax.shard_map(
            on_shard, mesh=mesh, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False
        )
    return on_shard(q, k, v, segment_BT)[:, :, :length].swapaxes(1, 2)


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
