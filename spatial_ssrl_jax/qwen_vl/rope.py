"""Rotary embeddings: M-RoPE of the text model and the 2-D rotary of the vision tower."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from spatial_ssrl_jax.qwen_vl.config import TextConfig, VisionConfig

Rotary = tuple[Array, Array]  # cosine and sine, each [..., H/2] float32


def text_rotary(config: TextConfig, position_B3T: Array) -> Rotary:
    """Cosine and sine of M-RoPE.

    Args:
      config: the text model's shape; `mrope_section` is how many of the H/2 frequencies rotate
        by the temporal, height and width position.
      position_B3T: [..., 3, T] int32 positions (temporal, height, width).

    Returns:
      Two float32 arrays [..., T, H/2].
    """
    axis = np.repeat(np.arange(3), config.mrope_section)
    frequency = _frequencies(config.head_dim, config.rope_theta)
    position = jnp.moveaxis(position_B3T, -2, -1)[..., axis]
    angle = position.astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def vision_rotary(config: VisionConfig, coords: Array) -> Rotary:
    """Cosine and sine of the vision tower.

    Args:
      config: the vision tower's shape.
      coords: [..., 2] int32 row and column of each patch in its image.

    Returns:
      Two float32 arrays [..., H/2]: the first half of the frequencies rotates by the row,
      the second by the column.
    """
    frequency = _frequencies(config.head_dim // 2, 10_000.0)
    angle = coords[..., None].astype(jnp.float32) * frequency
    angle = angle.reshape(*coords.shape[:-1], -1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (x[i], x[i + H/2]) of [..., T, heads, H] by angles [..., T, H/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x.dtype)


def _frequencies(size: int, theta: float) -> np.ndarray:
    return (1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / size)).astype(np.float32)
