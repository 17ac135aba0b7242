"""Spatial-SSRL in JAX: self-supervised reinforcement learning for spatial understanding."""
