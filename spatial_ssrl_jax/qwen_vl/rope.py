"""Rotary embeddings: M-RoPE of the text model and the 2-D rotary of the vision tower."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from spatial_ssrl_jax.qwen_vl.config import TextConfig, VisionConfig


def text_rotary(config: TextConfig, position_B3T: Array) -> tuple[Array, Array]:
    """Cosine and sine of M-RoPE.

    Args:
      config: the text model's shape; `mrope_section` says how many of the H/2 frequencies turn
        with the temporal, height and width position.
      position_B3T: [..., 3, T] int32 positions (temporal, height, width).

    Returns:
      Two float32 arrays [..., T, H/2].
    """
    axis = np.repeat(np.arange(3), config.mrope_section)
    frequency = _frequencies(config.head_dim, config.rope_theta)
    position = jnp.moveaxis(position_B3T, -2, -1)[..., axis]
    angle = position.astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def vision_rotary(config: VisionConfig, coords: Array) -> tuple[Array, Array]:
    """Cosine and sine of the vision tower.

    Args:
      config: the vision tower's shape.
      coords: [..., 2] int32 row and column of each patch in its image.

    Returns:
      Two float32 arrays [..., H/2]: the first half of the frequencies turns with the row, the
      second with the column.
    """
    frequency = _frequencies(config.head_dim // 2, 10_000.0)
    angle = coords[..., None].astype(jnp.float32) * frequency
    angle = angle.reshape(*coords.shape[:-1], -1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turns the pairs (x[i], x[i + H/2]) of [..., T, heads, H] by angles given as [..., T, H/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x.dtype)


def _frequencies(size: int, theta: float) -> np.ndarray:
    return (1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / size)).astype(np.float32)
