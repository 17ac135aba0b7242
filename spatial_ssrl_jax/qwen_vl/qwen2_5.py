"""Qwen2.5-VL's own parts: `config.json`, vision tower, patch order, M-RoPE positions, Hub names.

Shape letters: B prompts or rows, P patches, D width, M merged tokens (P/4).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from spatial_ssrl_jax.common.bounds import Bounds
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import FETCH, JsonObject
from spatial_ssrl_jax.common.text import shown
from spatial_ssrl_jax.qwen_vl.attention import Visible
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import PIXEL_KEYS, QwenVLConfig, TextConfig, VisionConfig
from spatial_ssrl_jax.qwen_vl.inputs import Grid, PatchLayout, VisionInput, patch_count
from spatial_ssrl_jax.qwen_vl.kernels import local_attention, self_attention
from spatial_ssrl_jax.qwen_vl.layers import GatedMLP, Init, Linear, RMSNorm, scan_layers
from spatial_ssrl_jax.qwen_vl.pixels import normalize_patches
from spatial_ssrl_jax.qwen_vl.rope import Rotary, rotate, vision_rotary

MODEL_TYPE = "qwen2_5_vl"
_ROPE = ("rope_parameters", "rope_scaling")  # the first that is there, newer releases' first
_THETA = Bounds(min=1)
TOKEN_IDS = {  # of the Hub's models, for a config.json without them
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}


@dataclass(frozen=True)
class Qwen2_5VisionConfig(VisionConfig):
    """Qwen2.5-VL's vision tower; the defaults are the Hub's.

    Attributes:
      fullatt_block_indexes: blocks in which patches see their whole image.
      tokens_per_second: positions that a second of a video takes.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    in_channels: int = 3
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    fullatt_block_indexes: tuple[int, ...] = ()
    tokens_per_second: float = 2

    @property
    def full_attention_blocks(self) -> int:
        return len(self.fullatt_block_indexes)


_WIDTH, _DEPTH = Bounds(min=1, max=2**24), Bounds(min=1, max=1024)
# Defaults of Transformers' Qwen2_5_VLConfig, as 4.49 writes only what differs from them; and what a
# value may be: a broken one must not ask for any amount of memory.
_TEXT = {
    "vocab_size": (152_064, _WIDTH),
    "hidden_size": (8192, _WIDTH),
    "intermediate_size": (29_568, _WIDTH),
    "num_hidden_layers": (80, _DEPTH),
    "num_attention_heads": (64, _DEPTH),
    "num_key_value_heads": (8, _DEPTH),
    "max_position_embeddings": (32_768, Bounds(min=1, max=2**31 - 1)),
}
_VISION = {
    "depth": (32, _DEPTH),
    "hidden_size": (3584, _WIDTH),
    "intermediate_size": (3420, _WIDTH),
    "num_heads": (16, _DEPTH),
    "out_hidden_size": (3584, _WIDTH),
    "patch_size": (14, Bounds(min=1, max=256)),
    "temporal_patch_size": (2, Bounds(min=1, max=16)),
    "spatial_merge_size": (2, Bounds(min=1, max=16)),
    "window_size": (112, Bounds(min=1, max=4096)),
}
_FULL_ATTENTION = (7, 15, 23, 31)


def config_from_dict(raw: dict[str, Any], name: str) -> QwenVLConfig:
    """Builds the config from the parsed `config.json`; `name` is used in errors.

    Raises:
      UserError: it lacks a value, holds a wrong one, or sizes that do not fit together.
    """
    whole = JsonObject(raw, name)
    # Newer releases nest the language model's settings, and write some in both places.
    text = JsonObject({**raw, **whole.get("text_config", dict, {})}, name)
    vision = JsonObject(whole.get("vision_config", dict), name, prefix="vision_config.")
    rope = next((s for key in _ROPE if (s := text.section(key)).values), text.section(_ROPE[0]))
    _refuse_variants(text, vision, rope, name)
    theta = rope.find("rope_theta", float, _THETA) or text.get("rope_theta", float, 1e6, _THETA)
    tied = whole.find("tie_word_embeddings", bool)
    sizes: list[dict[str, Any]] = [
        {k: section.get(k, int, default, limits) for k, (default, limits) in table.items()}
        for section, table in ((text, _TEXT), (vision, _VISION))
    ]
    config = QwenVLConfig(
        model_type=MODEL_TYPE,
        text=TextConfig(
            **sizes[0],
            mrope_section=_three(rope.items("mrope_section", int, length=3, bounds=_WIDTH)),
            rms_norm_eps=text.get("rms_norm_eps", float, 1e-5, Bounds(min=0, max=1)),
            rope_theta=float(theta),
        ),
        vision=Qwen2_5VisionConfig(
            **sizes[1],
            fullatt_block_indexes=vision.items(
                "fullatt_block_indexes", int, _FULL_ATTENTION, bounds=Bounds(min=0)
            ),
            tokens_per_second=vision.get("tokens_per_second", float, 4, Bounds(above=0, max=1e6)),
        ),
        tie_word_embeddings=(
            text.get("tie_word_embeddings", bool, False) if tied is None else tied
        ),
        suppressed=(),
        **_token_ids(text),
    )
    _check_sizes(config, name)
    return config


def _three(values: tuple[int, ...]) -> tuple[int, int, int]:
    first, second, third = values
    return first, second, third


def _refuse_variants(text: JsonObject, vision: JsonObject, rope: JsonObject, name: str) -> None:
    """Refuses settings with which the reference computes something else than we do.

    Raises:
      UserError: it names the setting.
    """
    settings = {
        "rope type": (rope, ("rope_type", "type"), ("default", "mrope")),
        "hidden_act": (text, ("hidden_act",), ("silu",)),
        "vision_config.hidden_act": (vision, ("hidden_act",), ("silu",)),
        "vision_config.in_channels": (vision, ("in_channels", "in_chans"), (3,)),
        "use_sliding_window": (text, ("use_sliding_window",), (False,)),
    }
    for key, (section, names, known) in settings.items():
        for value in (section.values.get(name) for name in names):
            if value is not None and value not in known:
                raise UserError(
                    f"{name} sets {key} to {shown(value)}, which is not supported; expected "
                    f"{' or '.join(map(shown, known))}."
                )


def _token_ids(text: JsonObject) -> dict[str, int]:
    """The ids of special tokens; of several the first, and the Hub's where there is none."""
    found, vocabulary = {}, text.get("vocab_size", int, _TEXT["vocab_size"][0])
    for key, default in TOKEN_IDS.items():
        known = Bounds(min=0, below=vocabulary)
        if isinstance(text.values.get(key), list):
            found[key] = next(iter(text.items(key, int, bounds=known)), default)
        else:
            found[key] = text.get(key, int, default, known)
    return found


def _check_sizes(config: QwenVLConfig, name: str) -> None:
    """Raises `UserError` where sizes contradict each other."""
    text, vision = config.text, config.vision
    problems = {
        "num_attention_heads does not divide hidden_size": (
            text.hidden_size % text.num_attention_heads
        ),
        "num_key_value_heads does not divide num_attention_heads": (
            text.num_attention_heads % text.num_key_value_heads
        ),
        "mrope_section is not half of a head, hidden_size / num_attention_heads": (
            2 * sum(text.mrope_section) != text.head_dim
        ),
        "vision_config.num_heads does not divide its hidden_size into heads of a multiple of 4": (
            vision.hidden_size % (4 * vision.num_heads)
        ),
        "vision_config.out_hidden_size is not hidden_size": (
            vision.out_hidden_size != text.hidden_size
        ),
        "vision_config.window_size is smaller than a merged patch": vision.window_side < 1,
    }
    problem = next((problem for problem, found in problems.items() if found), None)
    if problem:
        raise UserError(f"{name} contradicts itself ({problem}): {FETCH}.")


def config_to_dict(config: QwenVLConfig, dtype: str) -> dict[str, Any]:
    """The Hub's flat `config.json`, as Transformers and vLLM read it; `dtype` like `bfloat16`."""
    text = dataclasses.asdict(config.text)
    section, theta = list(text.pop("mrope_section")), text.pop("rope_theta")
    assert isinstance(config.vision, Qwen2_5VisionConfig)
    vision = dataclasses.asdict(config.vision)
    vision["in_chans"] = vision.pop("in_channels")
    for name in PIXEL_KEYS:  # of preprocessor_config.json
        del vision[name]
    vision["spatial_patch_size"] = config.vision.patch_size
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": MODEL_TYPE,
        **text,
        "rope_theta": theta,
        "rope_scaling": {"type": "mrope", "mrope_section": section},
        "max_window_layers": config.text.num_hidden_layers,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_cache": True,
        **{k: getattr(config, k) for k in TOKEN_IDS},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "vision_config": {
            **vision,
            "fullatt_block_indexes": list(config.vision.fullatt_block_indexes),
            "hidden_act": "silu",
            "model_type": MODEL_TYPE,
        },
    }


class VisionBlock(nnx.Module):
    """Attention and gated MLP, each after an RMSNorm."""

    def __init__(self, init: Init, config: Qwen2_5VisionConfig):
        width, heads, size = config.hidden_size, config.num_heads, config.head_dim
        self.window_patches = config.window_patches
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

    def __call__(
        self,
        x_BPD: Array,
        rotary: Rotary,
        of_window: Array,
        of_image: Visible,
        is_full: Array,
        compute: Compute,
    ) -> Array:
        """Runs the block.

        Args:
          x_BPD: the patches.
          rotary: their angles, [B, P, H/2].
          of_window: [B, P] int32, which window of the row a patch is of; -1 is padding.
          of_image: what it sees of its image or frame.
          is_full: [] bool, whether a patch sees its whole image; else its window.
          compute: how to compute.

        Returns:
          [B, P, D].
        """
        qkv = self.qkv(self.norm1(x_BPD))
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        q, k = rotate(q, *rotary), rotate(k, *rotary)

        def image(q: Array, k: Array, v: Array) -> Array:
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            return self_attention(q, k, v, of_image, compute, causal=False)

        def window(q: Array, k: Array, v: Array) -> Array:
            return local_attention(q, k, v, of_window, self.window_patches, compute)

        mixed = jax.lax.cond(is_full, image, window, q, k, v)
        x_BPD = x_BPD + self.proj(mixed)
        return x_BPD + self.mlp(self.norm2(x_BPD))


class Merger(nnx.Module):
    """Concatenates the four patches of a merged token and maps them to the text model's width."""

    def __init__(self, init: Init, config: Qwen2_5VisionConfig):
        wide = config.hidden_size * config.merge_unit
        self.norm = RMSNorm(init, config.hidden_size, 1e-6)
        self.up = Linear(init, (wide, wide), ("embed", "vision_ffn"), bias=True)
        self.down = Linear(init, (wide, config.out_hidden_size), ("vision_ffn", "embed"), bias=True)

    def __call__(self, x_BMC: Array) -> Array:
        return self.down(jax.nn.gelu(self.up(x_BMC), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding, blocks with windowed or full attention, and the merger."""

    def __init__(self, init: Init, config: Qwen2_5VisionConfig):
        self.config = config
        self.patch_embed = Linear(init, (config.patch_dim, config.hidden_size), (None, "embed"))
        self.blocks = VisionBlock(init.stacked(config.depth), config)
        self.merger = Merger(init, config)

    def encode(self, vision: VisionInput[Array], compute: Compute) -> Array:
        """Encodes the images of B prompts.

        Args:
          vision: the patches.
          compute: how to compute.

        Returns:
          [B, M, 4·D]: the four patches of each merged token, in the order of patches.
        """
        config = self.config
        pixels = normalize_patches(vision.patches, config)
        x = self.patch_embed(pixels.astype(compute.dtype))
        rotary = vision_rotary(config, vision.coords)
        of_window = self._windows(vision)
        of_image = Visible.in_segments(vision.frame, causal=False)
        full = [i in config.fullatt_block_indexes for i in range(config.depth)]

        def step(block: VisionBlock, x: Array, is_full: Array) -> tuple[Array, None]:
            x = compute.constrain(x)
            return block(x, rotary, of_window, of_image, is_full, compute), None

        x, _ = scan_layers(self.blocks, step, x, jnp.array(full), remat=compute.remat)
        return compute.constrain(x).reshape(len(x), x.shape[1] // config.merge_unit, -1)

    def _windows(self, vision: VisionInput[Array]) -> Array:
        """[B, P] int32, which window of the row each patch is of; -1 is padding."""
        side = self.config.window_side * self.config.spatial_merge_size
        place = jnp.concatenate((vision.frame[..., None], vision.coords // side), axis=-1)
        starts = (place[:, 1:] != place[:, :-1]).any(axis=-1)
        window = jnp.pad(jnp.cumsum(starts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
        return jnp.where(vision.frame >= 0, window, -1)

    def merge(self, x_BMC: Array, compute: Compute) -> Array:
        """[B, M, D_text]: one vector a merged token, of what `encode` gives."""
        patches = x_BMC.reshape(*x_BMC.shape[:2], self.config.merge_unit, -1)
        x = self.merger.norm(patches).reshape(x_BMC.shape)
        return compute.constrain(self.merger(x))


# Order of patches, and positions ------------------------------------------------------------------


def lay_out_patches(config: Qwen2_5VisionConfig, grids: Sequence[Grid]) -> PatchLayout:
    """Lays the patches of a prompt's images out, window after window and image after image."""
    total, unit, side = patch_count(grids), config.merge_unit, config.window_side
    source = np.zeros((total // unit, unit), np.int32)
    frame = np.zeros((total // unit, unit), np.int32)
    coords = np.zeros((total // unit, unit, 2), np.int32)
    merged, first, first_frame = [], 0, 0
    merge = config.spatial_merge_size
    inside = np.stack(np.divmod(np.arange(unit), merge), axis=-1)
    for t, h, w in grids:
        time, row, column = (
            a.ravel()
            for a in np.meshgrid(*map(np.arange, (t, h // merge, w // merge)), indexing="ij")
        )
        index = first + np.arange(len(time))
        slot = np.empty_like(index)
        slot[np.lexsort((column, row, column // side, row // side, time))] = index
        source[slot] = index[:, None] * unit + np.arange(unit)
        frame[slot] = (first_frame + time)[:, None]
        coords[slot] = np.stack((row, column), axis=-1)[:, None] * merge + inside
        merged.append(slot)
        first += len(time)
        first_frame += t
    return PatchLayout(
        source.ravel(),
        frame.ravel(),
        coords.reshape(-1, 2),
        np.concatenate(merged).astype(np.int32) if merged else np.zeros(0, np.int32),
    )


def mrope_positions(
    config: Qwen2_5VisionConfig,
    is_vision: np.ndarray,
    grids: Sequence[Grid],
    seconds_per_grid: Sequence[float | None],
) -> np.ndarray:
    """M-RoPE positions of a prompt.

    Args:
      config: the vision tower's shape.
      is_vision: [T] bool, the tokens that images and videos fill.
      grids: their grids in prompt order.
      seconds_per_grid: seconds between temporal frames of each video, None for an image.

    Returns:
      [3, T] int32: temporal, height and width position of each token.
    """
    position = np.zeros((3, len(is_vision)), np.int32)
    start, current = 0, 0
    remaining = iter(zip(grids, seconds_per_grid, strict=True))
    while start < len(is_vision):
        if not is_vision[start]:
            end = start + int(np.argmax(np.append(is_vision[start:], True)))
            position[:, start:end] = current + np.arange(end - start)
            current += end - start
        else:
            grid, seconds = next(remaining)
            t, h, w = (
                grid[0],
                grid[1] // config.spatial_merge_size,
                grid[2] // config.spatial_merge_size,
            )
            end = start + t * h * w
            # In float32 as in the reference: a product may round to the next whole position.
            step = np.float32(1 if seconds is None else config.tokens_per_second)
            step *= np.float32(1 if seconds is None else seconds)
            time = (np.arange(t, dtype=np.float32) * step).astype(np.int64)
            time, row, column = np.meshgrid(time, np.arange(h), np.arange(w), indexing="ij")
            position[:, start:end] = current + np.stack((time, row, column)).reshape(3, -1)
            # As in Transformers 5. Transformers 4 continues after the largest of time, row and
            # column, which differs for a video with more frames than rows and columns.
            current += max(h, w)
        start = end
    return position


# Names on the Hub ---------------------------------------------------------------------------------

# Our path -> the Hub's name; `{}` stands for the layer.
HUB_NAMES = {
    "vision/patch_embed/kernel": "visual.patch_embed.proj.weight",
    "vision/blocks/norm1/scale": "visual.blocks.{}.norm1.weight",
    "vision/blocks/norm2/scale": "visual.blocks.{}.norm2.weight",
    "vision/blocks/qkv": "visual.blocks.{}.attn.qkv",
    "vision/blocks/proj": "visual.blocks.{}.attn.proj",
    "vision/blocks/mlp/gate": "visual.blocks.{}.mlp.gate_proj",
    "vision/blocks/mlp/up": "visual.blocks.{}.mlp.up_proj",
    "vision/blocks/mlp/down": "visual.blocks.{}.mlp.down_proj",
    "vision/merger/norm/scale": "visual.merger.ln_q.weight",
    "vision/merger/up": "visual.merger.mlp.0",
    "vision/merger/down": "visual.merger.mlp.2",
    "text/embed": "model.embed_tokens.weight",
    "text/layers/norm1/scale": "model.layers.{}.input_layernorm.weight",
    "text/layers/norm2/scale": "model.layers.{}.post_attention_layernorm.weight",
    "text/layers/q": "model.layers.{}.self_attn.q_proj",
    "text/layers/k": "model.layers.{}.self_attn.k_proj",
    "text/layers/v": "model.layers.{}.self_attn.v_proj",
    "text/layers/o": "model.layers.{}.self_attn.o_proj",
    "text/layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "text/layers/mlp/up": "model.layers.{}.mlp.up_proj",
    "text/layers/mlp/down": "model.layers.{}.mlp.down_proj",
    "text/norm/scale": "model.norm.weight",
    "text/head": "lm_head.weight",
}

# Prefixes that Transformers 4.52 and later write, and the Hub's.
RENAMED = (("model.language_model.", "model."), ("model.visual.", "visual."))


def hub_shapes(config: Qwen2_5VisionConfig) -> dict[str, tuple[int, ...]]:
    """Our path -> shape on the Hub, of kernels that are not [out, in] there: a convolution's."""
    patch = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    return {"vision/patch_embed/kernel": (config.hidden_size, *patch)}
