"""Spatial-SSRL in JAX: self-supervised reinforcement learning for spatial understanding."""

__version__ = "0.1.0"
