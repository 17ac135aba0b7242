"""Normalising pixels on the device, from the bytes that images come in."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from spatial_ssrl_jax.qwen_vl.config import VisionConfig


def _pixel_table(config: VisionConfig) -> np.ndarray:
    """[C, 256] float32, the normalised value of each byte, rounded as Transformers rounds it."""
    mean, std = _moments(config)
    return (np.arange(256, dtype=np.float32) / np.float32(255) - mean[:, None]) / std[:, None]


def normalize_patches(patches: Array, config: VisionConfig) -> Array:
    """(byte / 255 - mean) / std of each value, by its channel.

    Each value is looked up, so that it is the float32 of Transformers' image processor: XLA would
    divide by multiplying with a rounded reciprocal. TPUs, slow at lookups, do that, and may differ
    in the last bit.

    Args:
      patches: [..., C·n] uint8.
      config: the vision tower's, with mean and standard deviation of each channel.

    Returns:
      [..., C·n] float32.
    """
    channels, table = config.in_channels, _pixel_table(config).ravel()
    channel = np.repeat(np.arange(channels), patches.shape[-1] // channels)
    mean, std = (values[channel] for values in _moments(config))

    def look_up(patches: Array) -> Array:
        return jnp.asarray(table)[patches + 256 * channel]

    def compute(patches: Array) -> Array:
        return (patches.astype(jnp.float32) / 255 - mean) / std

    return jax.lax.platform_dependent(patches, tpu=compute, default=look_up)


def _moments(config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """[C] float32 means and standard deviations."""
    return np.array(config.image_mean, np.float32), np.array(config.image_std, np.float32)
