"""The vision tower: windows of patches in, one vector for each merged token out.

Shape letters: B prompts, W windows of a prompt, S patches of a window (64), D width, M merged
tokens of a window (S/4).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spatial_ssrl_jax.qwen2_5_vl.config import VisionConfig
from spatial_ssrl_jax.qwen2_5_vl.kernels import XLA, Kernel, self_attention
from spatial_ssrl_jax.qwen2_5_vl.layers import GatedMLP, Init, Linear, RMSNorm, scan_layers
from spatial_ssrl_jax.qwen2_5_vl.rope import rotate, vision_rotary


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VisionInput:
    """All pictures and frames of each prompt, laid out by the host as padded windows.

    A window holds up to 8x8 patches; the four patches of a merged token are neighbours in it.

    Attributes:
      patches: [B, W, S, C·2·14·14] float, normalised pixels.
      frame: [B, W, S] int32, which picture or temporal frame of the prompt; -1 is padding.
      coords: [B, W, S, 2] int32, row and column of the patch in its picture.
    """

    patches: Array
    frame: Array
    coords: Array


class VisionBlock(nnx.Module):
    """Attention and gated MLP, each behind an RMSNorm."""

    def __init__(self, init: Init, config: VisionConfig):
        width, heads, size = config.hidden_size, config.num_heads, config.head_dim
        self.norm1 = RMSNorm(init, width, 1e-6)
        self.norm2 = RMSNorm(init, width, 1e-6)
        qkv_axes = ("embed", None, "heads", "head_dim")
        self.qkv = Linear(init, (width, 3, heads, size), qkv_axes, bias=True)
        out_axes = ("heads", "head_dim", "embed")
        self.proj = Linear(
            init, (heads, size, width), out_axes, contract=2, bias=True, ends_branch=True
        )
        inner = config.intermediate_size
        self.mlp = GatedMLP(init, width, inner, bias=True, axes=("embed", "vision_ffn"))

    def __call__(self, x_BWSD, rotary, segment_window, segment_full, is_full, chunk, kernel):
        batch, windows, size, _ = x_BWSD.shape
        qkv = self.qkv(self.norm1(x_BWSD))
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        q, k = rotate(q, *rotary), rotate(k, *rotary)

        def over(rows: int, segment: Array, kernel: Kernel):
            def run(q, k, v):
                q, k, v = (t.reshape(rows, -1, *t.shape[3:]) for t in (q, k, v))
                k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
                segments = segment.reshape(rows, -1)
                out = self_attention(q, k, v, segments, causal=False, chunk=chunk, kernel=kernel)
                return out.reshape(batch, windows, size, *out.shape[2:])

            return run

        full = over(batch, segment_full, kernel)
        # Splash's blocks are twice as long as a window.
        short = kernel if kernel.name == "cudnn" else XLA
        window = over(batch * windows, segment_window, short)
        mixed = jax.lax.cond(is_full, full, window, q, k, v)
        x_BWSD = x_BWSD + self.proj(mixed)
        return x_BWSD + self.mlp(self.norm2(x_BWSD))


class Merger(nnx.Module):
    """Joins the four patches of a merged token and maps them to the language model's width."""

    def __init__(self, init: Init, config: VisionConfig):
        wide = config.hidden_size * config.merge_unit
        self.norm = RMSNorm(init, config.hidden_size, 1e-6)
        self.up = Linear(init, (wide, wide), ("embed", "vision_ffn"), bias=True)
        self.down = Linear(init, (wide, config.out_hidden_size), ("vision_ffn", "embed"), bias=True)

    def __call__(self, x_BMC: Array) -> Array:
        return self.down(jax.nn.gelu(self.up(x_BMC), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding, blocks with windowed or full attention, and the merger."""

    def __init__(self, init: Init, config: VisionConfig):
        self.config = config
        self.patch_embed = Linear(init, (config.patch_dim, config.hidden_size), (None, "embed"))
        self.blocks = VisionBlock(init.stacked(config.depth), config)
        self.merger = Merger(init, config)

    def __call__(
        self,
        vision: VisionInput,
        *,
        dtype,
        chunk: int,
        remat: str,
        kernel: Kernel = XLA,
        hold: Callable[[Array], Array] = lambda x: x,
    ) -> Array:
        """Encodes the pictures of B prompts.

        Args:
          vision: the windows.
          dtype: compute dtype.
          chunk: patches that attend at a time in full attention.
          remat: what the backward pass works out again of each block.
          kernel: what computes full attention.
          hold: keeps activations where their rows lie.

        Returns:
          [B, W·M, D_text]: one vector a merged token, in window order.
        """
        config = self.config
        batch, windows, size = vision.frame.shape
        x = self.patch_embed(vision.patches.astype(dtype))
        rotary = vision_rotary(config, vision.coords)
        segment_window = jnp.where(vision.frame >= 0, 0, -1)
        full = [i in config.fullatt_block_indexes for i in range(config.depth)]

        def step(block: VisionBlock, x: Array, is_full: Array):
            segments = (segment_window, vision.frame)
            return block(hold(x), rotary, *segments, is_full, chunk, kernel), None

        x, _ = scan_layers(self.blocks, step, x, jnp.array(full), remat=remat)
        x = self.merger.norm(hold(x))
        x = x.reshape(batch, windows * size // config.merge_unit, -1)
        return hold(self.merger(x))
