"""What computes attention: XLA, the fused kernels of JAX's libraries, or our own for a decode step.

Every kernel takes one softmax over all the keys that a query sees: nothing is merged by
log-sum-exp, whose gradient these libraries drop.

Shape letters: B rows, T tokens, N query heads, K key/value heads, H head size; of a decode step
B groups, G samples, P = N/K + 2 heads of a key/value head, R slots.
"""

import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.attention import (
    GroupLimits,
    Visible,
    attend,
    attend_block,
    attend_shared,
)
from spatial_ssrl_jax.qwen_vl.compute import XLA, AttentionKernel, Compute
from spatial_ssrl_jax.qwen_vl.cudnn import attend_cudnn
from spatial_ssrl_jax.qwen_vl.decode_kernel import attend_decode
from spatial_ssrl_jax.qwen_vl.rope import Rotary, rotate
from spatial_ssrl_jax.qwen_vl.splash import attend_splash

KeyValues = tuple[Array, Array]  # keys and values

KERNELS = ("xla", "splash", "cudnn")
DECODE_KERNELS = ("xla", "triton")
_ON_GPUS = ("cudnn", "triton")


class Auto(NamedTuple):
    """What `auto` is.

    Attributes:
      attention: of `KERNELS`.
      decode: of `DECODE_KERNELS`.
    """

    attention: str
    decode: str


_PLAIN = Auto("xla", "xla")
# In bfloat16 by a GPU's compute capability; `_PLAIN` on others. `bench verify-kernels` says what is
# right on the device at hand. `triton` was run on a GPU of 9.0; `cudnn` as it is here, in packed
# rows, was run on none.
AUTO_ON_GPUS = {
    8.0: _PLAIN,  # A100
    8.9: _PLAIN,  # L4, L40S, RTX 40
    9.0: Auto("xla", "triton"),  # H100, H200
    10.0: _PLAIN,  # B200
}


def choose_kernel(
    name: str, dtype: str, mesh: Mesh, setting: str = "model.attention"
) -> AttentionKernel:
    """The kernel of attention over many tokens that a setting selects on the devices of a mesh.

    Args:
      name: `auto` or one of `KERNELS`.
      dtype: compute dtype.
      mesh: the devices.
      setting: the setting that holds the name, for errors.

    Raises:
      UserError: it cannot run on these devices.
    """
    device, heads_sharded = mesh.devices.flat[0], mesh.shape["tensor"] > 1
    if name == "auto":
        name = auto_kernels(device, dtype).attention
        name = "xla" if name == "cudnn" and heads_sharded else name
    _check_kernel(setting, name, dtype, device)
    if name == "cudnn" and heads_sharded:
        raise UserError(
            f"{setting}=cudnn is not tested with heads sharded over devices: set the mesh's tensor "
            f"to 1, or {setting}=xla."
        )
    return AttentionKernel(name, mesh)


def choose_decode_kernel(
    name: str, dtype: str, mesh: Mesh, setting: str = "rollout.attention"
) -> AttentionKernel:
    """The kernel of a decode step's attention, as `choose_kernel`; a name of `DECODE_KERNELS`.

    `auto` is `triton` on one device alone: it was measured on no more.

    Raises:
      UserError: it cannot run on these devices.
    """
    device = mesh.devices.flat[0]
    if name == "auto":
        name = auto_kernels(device, dtype).decode if mesh.size == 1 else "xla"
    _check_kernel(setting, name, dtype, device)
    return AttentionKernel(name, mesh)


def auto_kernels(
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm] - jax types its class as a variable
    dtype: str,
) -> Auto:
    """What `auto` is on one device."""
    if dtype != "bfloat16":
        return _PLAIN
    if device.platform == "gpu":
        return AUTO_ON_GPUS.get(_capability(device), _PLAIN)
    return Auto("splash", "xla") if device.platform == "tpu" else _PLAIN


def _check_kernel(
    setting: str,
    name: str,
    dtype: str,
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm] - jax types its class as a variable
) -> None:
    """Refuses a kernel that cannot run.

    Raises:
      UserError: the device is of another kind or too old, or the dtype is not the kernel's.
    """
    why, instead = "", f"set {setting}=xla"
    if name == "splash" and device.platform != "tpu":
        why = f"runs only on TPUs, and this device is a {device.platform}"
    elif name in _ON_GPUS and device.platform != "gpu":
        why = f"runs only on NVIDIA GPUs, and this device is a {device.platform}"
    elif name in _ON_GPUS and dtype != "bfloat16":
        why = "computes only in bfloat16"
        instead = f"set the dtype to bfloat16 in place of {dtype}, or {setting}=xla"
    elif name in _ON_GPUS and _capability(device) < 8:
        why = (
            "needs an NVIDIA GPU of compute capability 8.0 or more, and this "
            f"{device.device_kind} has {getattr(device, 'compute_capability', None)}"
        )
    if why:
        raise UserError(f"{setting}={name} {why}: {instead}.")


def _capability(
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm] - as above
) -> float:
    """An NVIDIA GPU's compute capability; 0 where it is not known."""
    version = str(getattr(device, "compute_capability", ""))
    return float(version) if re.fullmatch(r"\d+\.\d+", version) else 0.0


def self_attention(
    q_BTNH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    visible: Visible,
    compute: Compute,
    *,
    causal: bool,
    limits: GroupLimits | None = None,
) -> Array:
    """Self-attention inside rows.

    Args:
      q_BTNH, k_BKTH, v_BKTH: queries, keys and values.
      visible: which keys a token sees; the results of padding are undefined.
      compute: the kernel, and the queries that attend at a time.
      causal: a token sees none after it.
      limits: of the row's groups; None where a causal row is one segment with padding after it.

    Returns:
      [B, T, N, H] in the dtype of `v`.
    """
    kernel = compute.attention
    if kernel.name == "splash":
        return attend_splash(q_BTNH, k_BKTH, v_BKTH, visible, kernel, causal=causal, limits=limits)
    if kernel.name == "cudnn" and causal and limits is None:
        return attend_cudnn(q_BTNH, k_BKTH, v_BKTH, None, causal=True)
    block = attend_cudnn if kernel.name == "cudnn" else attend_block
    run = partial(attend, chunk=compute.attention_chunk, block=block)
    if q_BTNH.shape[1] > compute.attention_chunk and compute.batch_sharding is not None:
        # Rows differ in the keys that they see: each device goes through its own.
        rows = P(kernel.rows)
        run = jax.shard_map(
            run,
            mesh=compute.batch_sharding.mesh,
            in_specs=rows,
            out_specs=rows,
            axis_names=set(kernel.rows),
            check_vma=False,
        )
    return run(q_BTNH, k_BKTH, v_BKTH, visible)


def local_attention(
    q_BTNH: Array,
    k_BTNH: Array,
    v_BTNH: Array,
    segment_BT: Array,
    longest: int,
    compute: Compute,
) -> Array:
    """Attention inside short segments: a block of tokens sees itself and its two neighbours.

    Args:
      q_BTNH, k_BTNH, v_BTNH: queries, keys and values.
      segment_BT: int32, which segment; the tokens of one are neighbours, and -1 is padding, whose
        results are undefined.
      longest: tokens of a segment at most, and of a block.
      compute: the kernel, where `splash`, whose blocks are longer than such segments, gives way to
        XLA; and the queries of a row that attend at a time.

    Returns:
      [B, T, N, H] in the dtype of `v`.
    """
    batch, length = segment_BT.shape
    count = -(-length // longest)
    chunks = -(-count // max(compute.attention_chunk // longest, 1))
    of_chunk = -(-count // chunks)  # blocks
    block = attend_cudnn if compute.attention.name == "cudnn" else attend_block

    def split(x: Array) -> Array:
        """[chunks, B, blocks, longest, …], padded at the end."""
        padding = ((0, 0), (0, chunks * of_chunk * longest - length), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, padding).reshape(batch, chunks, of_chunk, longest, *x.shape[2:])
        return x.swapaxes(0, 1)

    def with_ends(x: Array) -> Array:
        """Each chunk after the last block of the one before it, and before the next one's first."""
        ends = ((1, 0), *((0, 0),) * (x.ndim - 1)), ((0, 1), *((0, 0),) * (x.ndim - 1))
        before, after = jnp.pad(x[:-1, :, -1:], ends[0]), jnp.pad(x[1:, :, :1], ends[1])
        return jnp.concatenate((before, x, after), axis=2)

    def near(x: Array) -> Array:
        """[B·blocks, 3·longest, …], each block between its neighbours; an only one has none."""
        parts = (x[:, :-2], x[:, 1:-1], x[:, 2:]) if count > 1 else (x[:, 1:-1],)
        x = jnp.concatenate(parts, axis=2)
        return x.reshape(-1, *x.shape[2:])

    @jax.checkpoint
    def attend_chunk(part: tuple[Array, Array, Array, Array, Array]) -> Array:
        q, keys, values, segment, of_keys = part
        keys, values = near(keys).swapaxes(1, 2), near(values).swapaxes(1, 2)
        of_keys = near(of_keys)[:, None]
        seen = (segment.reshape(-1, longest, 1) == of_keys) & (of_keys > 0)
        return block(q.reshape(-1, *q.shape[2:]), keys, values, seen).reshape(q.shape)

    segment = split(segment_BT + 1)  # 0 is padding
    keys, values, of_keys = (with_ends(x) for x in (split(k_BTNH), split(v_BTNH), segment))
    parts = split(q_BTNH), keys, values, segment, of_keys
    out = jax.lax.map(attend_chunk, parts).swapaxes(0, 1)
    return out.reshape(batch, -1, *q_BTNH.shape[2:])[:, :length]


def decode_attention(
    qkv_BGKPH: Array,
    rotary: Rotary,
    prefix: KeyValues,
    prefix_valid_BT: Array,
    own: KeyValues,
    cursor: Array,
    *,
    kernel: AttentionKernel = XLA,
) -> tuple[Array, KeyValues]:
    """One token of each of G samples, over the prompt they share and each sample's own tokens.

    Args:
      qkv_BGKPH: the query heads, the key and the value of each key/value head, before rotation.
      rotary: angles of the token's position, [B, H/2].
      prefix: the prompts' keys and values [B, K, T, H], once a group.
      prefix_valid_BT: bool, which prompt tokens exist; padding follows them.
      own: keys and values [B, G, K, R, H] in each sample's R slots.
      cursor: int32, the slot that every sample writes; later ones are not seen.
      kernel: what computes it: one of `DECODE_KERNELS`.

    Returns:
      [B, G, N, H] in the dtype of the values, and the new `own`.
    """
    if kernel.name == "xla":
        return _decode_by_xla(qkv_BGKPH, rotary, prefix, prefix_valid_BT, own, cursor)
    run = partial(attend_decode, interpret=kernel.interpret)
    if kernel.mesh is not None and kernel.mesh.size > 1:
        heads = None if qkv_BGKPH.shape[2] % kernel.mesh.shape[kernel.heads] else kernel.heads
        sample, shared, rows = P(kernel.rows, None, heads), P(kernel.rows, heads), P(kernel.rows)
        run = jax.shard_map(
            run,
            mesh=kernel.mesh,
            in_specs=(sample, rows, rows, shared, shared, rows, sample, sample, P()),
            out_specs=(sample, sample, sample),
            check_vma=False,
        )
    length_B = prefix_valid_BT.sum(axis=1, dtype=jnp.int32)
    out, keys, values = run(qkv_BGKPH, *rotary, *prefix, length_B, *own, cursor)
    return out, (keys, values)


def _decode_by_xla(
    qkv_BGKPH: Array,
    rotary: Rotary,
    prefix: KeyValues,
    prefix_valid_BT: Array,
    own: KeyValues,
    cursor: Array,
) -> tuple[Array, KeyValues]:
    q, k, v = qkv_BGKPH[..., :-2, :], qkv_BGKPH[..., -2, :], qkv_BGKPH[..., -1, :]
    q = q.reshape(*q.shape[:2], -1, q.shape[-1])
    q, k = (rotate(x, *(angle[:, None] for angle in rotary)) for x in (q, k))
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(cache, new[:, :, :, None], cursor, axis=3)
        for cache, new in zip(own, (k, v), strict=True)
    )
    slots = keys.shape[3]
    seen = jnp.broadcast_to(jnp.arange(slots) <= cursor, (*q.shape[:2], 1, slots))
    out = attend_shared(q[:, :, None], *prefix, prefix_valid_BT, keys, values, seen)
    return out[:, :, 0], (keys, values)
