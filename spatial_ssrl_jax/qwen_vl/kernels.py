"""What computes attention: XLA, the fused kernels of JAX's libraries, or our own for a decode step.

Every choice is one softmax over all the keys that a query sees: nothing is merged by log-sum-exp,
whose gradient these libraries drop.

Shape letters: B rows, T tokens, N query heads, K key/value heads, H head size; of a decode step
B groups, G samples, P = N/K + 2 heads of a key/value head, R slots.
"""

import re
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.qwen_vl.attention import attend, attend_shared
from spatial_ssrl_jax.qwen_vl.compute import XLA, AttentionKernel, Compute
from spatial_ssrl_jax.qwen_vl.decode_kernel import attend_decode
from spatial_ssrl_jax.qwen_vl.layers import ATTENDED
from spatial_ssrl_jax.qwen_vl.rope import rotate

KERNELS = ("xla", "splash", "cudnn")
FUSED = ("splash", "cudnn")  # have a form of their own for a whole group
DECODE_KERNELS = ("xla", "triton")
_ON_GPUS = ("cudnn", "triton")
_MEASURED = 9.0  # compute capability of the GPUs that `triton` was run on
_LANES = 128  # a block is a multiple of these
_BLOCKS = (512, 256, _LANES)  # tokens of a block, the fastest first
_PADDED = 1 / 8  # most of a row that may be padding for the sake of a larger block
BLOCKS_RUN = "splash_blocks_"  # a call's scope, with the blocks of a row and head that it computes


def choose_kernel(
    name: str, dtype: str, mesh: Mesh, setting: str = "model.attention"
) -> AttentionKernel:
    """The kernel of long attention that a name stands for on the devices of a mesh.

    Args:
      name: `auto` or one of `KERNELS`.
      dtype: compute dtype.
      mesh: the devices.
      setting: where the user has the name from.

    Raises:
      UserError: it cannot run on these devices.
    """
    device = mesh.devices.flat[0]
    if name == "auto":
        name = "splash" if device.platform == "tpu" and dtype == "bfloat16" else "xla"
    _check_kernel(setting, name, dtype, device)
    if name == "cudnn" and mesh.shape["tensor"] > 1:
        raise UserError(
            f"{setting}=cudnn was not tried with heads cut over devices: set the mesh's tensor to "
            f"1, or {setting}=xla."
        )
    return AttentionKernel(name, mesh)


def choose_decode_kernel(
    name: str, dtype: str, mesh: Mesh, setting: str = "rollout.attention"
) -> AttentionKernel:
    """The kernel of a decode step's attention, as `choose_kernel`; a name of `DECODE_KERNELS`.

    `auto` is `triton` where it was run: on one GPU of the measured kind.

    Raises:
      UserError: it cannot run on these devices.
    """
    device = mesh.devices.flat[0]
    if name == "auto":
        hopper = device.platform == "gpu" and _capability(device) == _MEASURED
        name = "triton" if hopper and dtype == "bfloat16" and mesh.size == 1 else "xla"
    _check_kernel(setting, name, dtype, device)
    return AttentionKernel(name, mesh)


def _check_kernel(setting: str, name: str, dtype: str, device: jax.Device) -> None:
    """Refuses a kernel that cannot run.

    Raises:
      UserError: the device is of another kind or too old, or the dtype is not the kernel's.
    """
    why, instead = "", f"set {setting}=xla"
    if name == "splash" and device.platform != "tpu":
        why = f"runs on TPUs alone, and here is {device.platform}"
    elif name in _ON_GPUS and device.platform != "gpu":
        why = f"runs on NVIDIA GPUs alone, and here is {device.platform}"
    elif name in _ON_GPUS and dtype != "bfloat16":
        why = "computes in bfloat16 alone"
        instead = f"set the dtype to bfloat16 in place of {dtype}, or {setting}=xla"
    elif name in _ON_GPUS and _capability(device) < 8:
        why = (
            "needs an NVIDIA GPU of compute capability 8.0 or more, and this "
            f"{device.device_kind} has {getattr(device, 'compute_capability', None)}"
        )
    if why:
        raise UserError(f"{setting}={name} {why}: {instead}.")


def _capability(device: jax.Device) -> float:
    """An NVIDIA GPU's compute capability; 0 where it is not known."""
    said = str(getattr(device, "compute_capability", ""))
    return float(said) if re.fullmatch(r"\d+\.\d+", said) else 0.0


def self_attention(
    q_BTNH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    segment_BT: Array,
    compute: Compute,
    *,
    causal: bool,
    single: bool = False,
) -> Array:
    """Attention inside segments, of tokens to themselves.

    Args:
      q_BTNH, k_BKTH, v_BKTH: queries, keys and values.
      segment_BT: int32 segment of each token; -1 is padding, whose results mean nothing.
      compute: the kernel, and queries at a time by `xla`.
      causal: a token sees none after it.
      single: a row is one segment with padding after it, which spares causal `cudnn` its mask.

    Returns:
      [B, T, N, H] in the dtype of `v`.
    """
    kernel = compute.attention
    if kernel.name == "splash":
        mask = _causal if causal else _all
        return _splash(q_BTNH, k_BKTH, v_BKTH, segment_BT, mask, kernel)
    if kernel.name == "cudnn":
        # Padding sees padding, for a row without any key has no softmax.
        same = segment_BT[:, :, None] == segment_BT[:, None]
        return _cudnn(q_BTNH, k_BKTH, v_BKTH, None if causal and single else same, causal)
    chunk = compute.attention_chunk
    return attend(q_BTNH, k_BKTH, v_BKTH, segment_BT, segment_BT, causal=causal, chunk=chunk)


def group_attention(
    q_BTNH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    valid_BT: Array,
    kernel: AttentionKernel,
    *,
    prompt: int,
    response: int,
) -> Array:
    """Attention over `[prompt | response 1 | … | response G]` by a fused kernel.

    The prompt attends to itself causally, each response to the prompt and causally to itself.

    Args:
      q_BTNH, k_BKTH, v_BKTH: queries, keys and values of prompt and responses.
      valid_BT: bool, which tokens exist; the results of others mean nothing.
      kernel: what computes it, `splash` or `cudnn`.
      prompt: tokens of the prompt, padding included.
      response: tokens of each response, padding included.

    Returns:
      [B, T, N, H] in the dtype of `v`.
    """
    if kernel.name == "cudnn":
        return _group_by_cudnn(q_BTNH, k_BKTH, v_BKTH, valid_BT, prompt, response)
    group = (q_BTNH.shape[1] - prompt) // response
    mask = partial(GroupMask, prompt=prompt, response=response, group=group)
    return _splash(q_BTNH, k_BKTH, v_BKTH, jnp.where(valid_BT, 0, -1), mask, kernel)


def decode_attention(
    qkv_BGKPH: Array,
    rotary: tuple[Array, Array],
    prefix: tuple[Array, Array],
    prefix_valid_BT: Array,
    own: tuple[Array, Array],
    cursor: Array,
    *,
    kernel: AttentionKernel = XLA,
) -> tuple[Array, tuple[Array, Array]]:
    """One token of each of G samples, over the prompt they share and each sample's own tokens.

    Args:
      qkv_BGKPH: of each key/value head its query heads, its key and its value; not rotated.
      rotary: angles of the token's position, [B, H/2].
      prefix: the prompts' keys and values [B, K, T, H], once a group.
      prefix_valid_BT: bool, which prompt tokens exist; padding is after.
      own: keys and values [B, G, K, R, H] in each sample's R slots.
      cursor: int32, the slot that every sample writes; later ones are not seen.
      kernel: what computes it: one of `DECODE_KERNELS`.

    Returns:
      [B, G, N, H] in the dtype of the values, and the new `own`.
    """
    if kernel.name == "xla":
        return _step_by_xla(qkv_BGKPH, rotary, prefix, prefix_valid_BT, own, cursor)
    run = partial(attend_decode, interpret=kernel.interpret)
    if kernel.mesh is not None and kernel.mesh.size > 1:
        heads = None if qkv_BGKPH.shape[2] % kernel.mesh.shape[kernel.heads] else kernel.heads
        each, shared, rows = P(kernel.rows, None, heads), P(kernel.rows, heads), P(kernel.rows)
        run = jax.shard_map(
            run,
            mesh=kernel.mesh,
            in_specs=(each, rows, rows, shared, shared, rows, each, each, P()),
            out_specs=(each, each, each),
            check_vma=False,
        )
    length_B = prefix_valid_BT.sum(axis=1, dtype=jnp.int32)
    out, *own = run(qkv_BGKPH, *rotary, *prefix, length_B, *own, cursor)
    return out, tuple(own)


def _step_by_xla(
    qkv_BGKPH: Array,
    rotary: tuple[Array, Array],
    prefix: tuple[Array, Array],
    prefix_valid_BT: Array,
    own: tuple[Array, Array],
    cursor: Array,
) -> tuple[Array, tuple[Array, Array]]:
    q, k, v = qkv_BGKPH[..., :-2, :], qkv_BGKPH[..., -2, :], qkv_BGKPH[..., -1, :]
    q = q.reshape(*q.shape[:2], -1, q.shape[-1])
    q, k = (rotate(x, *(angle[:, None] for angle in rotary)) for x in (q, k))
    own = tuple(
        jax.lax.dynamic_update_slice_in_dim(cache, new[:, :, :, None], cursor, axis=3)
        for cache, new in zip(own, (k, v), strict=True)
    )
    slots = own[0].shape[3]
    seen = jnp.broadcast_to(jnp.arange(slots) <= cursor, (*q.shape[:2], 1, slots))
    out = attend_shared(q[:, :, None], *prefix, prefix_valid_BT, *own, seen, chunk=1)
    return out[:, :, 0], own


class GroupMask(masks._ComputableMask):
    """What the tokens of `[prompt | response 1 | … | response G | padding]` see."""

    def __init__(self, shape: tuple[int, int], prompt: int, response: int, group: int):
        self._key = (shape, prompt, response, group)

        def seen(query, key):
            # Where the query's response begins, without a division: the kernel has no fast one.
            later = [prompt + i * response for i in range(1, group)]
            begins = prompt + response * sum((query >= at) * 1 for at in later)
            return (query >= key) & ((key < prompt) | (key >= begins))

        super().__init__(shape, seen)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash((GroupMask, self._key))


_causal, _all = masks.CausalMask, masks.FullMask


def _splash(
    q_BTNH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    segment_BT: Array,
    mask: Callable[[tuple[int, int]], masks.Mask],
    kernel: AttentionKernel,
) -> Array:
    """Splash attention under a mask that is known beforehand, and inside segments."""
    length, heads, size = q_BTNH.shape[1:]
    padded, block = _padded(length)
    more = [(0, 0), (0, padded - length)]
    q = (q_BTNH.astype(jnp.float32) * size**-0.5).astype(q_BTNH.dtype).swapaxes(1, 2)
    q, *keys = (jnp.pad(x, ((0, 0), *more, (0, 0))) for x in (q, k_BKTH, v_BKTH))
    segment_BT = jnp.pad(segment_BT, more, constant_values=-1)
    mesh = kernel.mesh if kernel.mesh is not None and kernel.mesh.size > 1 else None
    parts = mesh.shape[kernel.heads] if mesh else 1
    run, blocks = _program(mask((padded, padded)), heads // parts, block, kernel.interpret)

    def on_one(q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, segment_BT: Array) -> Array:
        with jax.named_scope(f"{BLOCKS_RUN}{blocks}"):
            ids = splash.SegmentIds(segment_BT, segment_BT)
            return jax.vmap(run)(q_BNTH, k_BKTH, v_BKTH, ids)

    if mesh:
        if keys[0].shape[1] % parts:  # fewer key heads than parts: each part has the one it needs
            keys = [jnp.repeat(x, parts // x.shape[1], axis=1) for x in keys]
        spec, rows = P(kernel.rows, kernel.heads), P(kernel.rows)
        on_one = jax.shard_map(
            on_one, mesh=mesh, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False
        )
    return on_one(q, *keys, segment_BT)[:, :, :length].swapaxes(1, 2)


def _padded(length: int) -> tuple[int, int]:
    """A row's length for splash, and its blocks'."""
    for block in _BLOCKS:
        padded = -(-length // block) * block
        if padded - length <= _PADDED * length:
            return padded, block
    return padded, block


@cache
def _program(
    mask: masks.Mask, heads: int, block: int, interpret: bool
) -> tuple[splash.SplashAttentionKernel, int]:
    """The kernel for one row, and how many blocks of a head are not hidden whole."""
    sizes = splash.BlockSizes(*(block,) * 8)
    with jax.ensure_compile_time_eval():
        made = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENDED,
            interpret=interpret,
        )
    # NumPy arrays belong to no device, so that any program can hold them.
    made = jax.tree.map(np.asarray, made)
    blocks = made.fwd_mask_info.block_mask
    every = (mask.shape[0] // block) ** 2
    return made, every if blocks is None else int((blocks[0] > 0).sum())


def _group_by_cudnn(
    q_BTNH: Array, k_BKTH: Array, v_BKTH: Array, valid_BT: Array, prompt: int, response: int
) -> Array:
    """The prompts, which need no mask, then each response as a row after a copy of its prompt.

    A mask doubles cuDNN's time; with a whole group in one call all its tokens would need one.
    """
    batch, length, heads, size = q_BTNH.shape
    group = (length - prompt) // response
    keys, values = k_BKTH[:, :, :prompt], v_BKTH[:, :, :prompt]
    first = _cudnn(q_BTNH[:, :prompt], keys, values, None, causal=True)

    def behind_prompts(shared_BKTH: Array, x_BKTH: Array) -> Array:
        own = x_BKTH[:, :, prompt:].reshape(batch, -1, group, response, size).swapaxes(1, 2)
        own = own.reshape(batch * group, -1, response, size)
        return jnp.concatenate((jnp.repeat(shared_BKTH, group, axis=0), own), axis=2)

    # Padding after a response is hidden from it by order, and sees the prompt itself.
    order = jnp.tril(jnp.ones((response, response), bool))
    rows = (batch * group, response)
    of_prompt = jnp.repeat(valid_BT[:, None, :prompt], group, axis=0)
    seen = jnp.concatenate(
        (jnp.broadcast_to(of_prompt, (*rows, prompt)), jnp.broadcast_to(order, (*rows, response))),
        axis=-1,
    )
    own_q = q_BTNH[:, prompt:].reshape(*rows, heads, size)
    own_keys, own_values = behind_prompts(keys, k_BKTH), behind_prompts(values, v_BKTH)
    own = _cudnn(own_q, own_keys, own_values, seen, causal=False)
    return jnp.concatenate((first, own.reshape(batch, -1, heads, size)), axis=1)


def _cudnn(
    q_BTNH: Array, k_BKTH: Array, v_BKTH: Array, seen_BTT: Array | None, causal: bool
) -> Array:
    """cuDNN's fused attention; the mask, if there is one, is one for all heads."""
    length, keys = q_BTNH.shape[1], k_BKTH.shape[2]
    more, more_keys = (0, length % 2), (0, keys % 2)  # JAX lets it train on even lengths alone
    q = jnp.pad(q_BTNH, ((0, 0), more, (0, 0), (0, 0)))
    k, v = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), more_keys, (0, 0), (0, 0))) for x in (k_BKTH, v_BKTH)
    )
    if seen_BTT is not None:
        # What is added is seen by nothing, and sees all else.
        seen_BTT = jnp.pad(seen_BTT, ((0, 0), more, (0, 0)), constant_values=True)
        seen_BTT = jnp.pad(seen_BTT, ((0, 0), (0, 0), more_keys))[:, None]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=seen_BTT, is_causal=causal, implementation="cudnn"
    )
    return out[:, :length]
