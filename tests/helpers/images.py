"""Synthetic images and depth maps for the task tests: smooth structure with noise on it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from spatial_ssrl_jax.tasks.record import Record

ROUNDING = 1e-5  # normalised depth is float32; the checks recompute it in float64


def photo(seed: int, height: int, width: int) -> np.ndarray:
    """[H, W, 3] uint8: soft blobs of colour that repeat nowhere, with noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(20, 230, (7, 9, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 16, 239).astype(np.uint8)


def room(seed: int, height: int, width: int, holes: float = 0.0) -> np.ndarray:
    """[H, W] float32 metres: a floor, a tilted wall and boxes, with noise and square holes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32) / min(height, width)
    depth = 8.0 - 5.5 * np.clip(1.7 * y - 0.6, 0, 1) + 0.8 * np.sin(3 * x + seed)
    for _ in range(4):
        top, left = rng.integers(0, height), rng.integers(0, width)
        depth[top : top + height // 3, left : left + width // 3] = rng.uniform(1.5, 7)
    depth += 0.01 * rng.normal(size=depth.shape)
    side = max(2, height // 24)
    for _ in range(round(holes * height * width / side**2)):
        top, left = rng.integers(0, height), rng.integers(0, width)
        depth[top : top + side, left : left + side] = np.nan
    return depth.astype(np.float32)


def record(
    seed: int = 0, height: int = 112, width: int = 112, holes: float = 0.0, **changes: Any
) -> Record:
    """An image with depth; `changes` replace fields."""
    fields = {
        "image": photo(seed, height, width),
        "depth": room(seed, height, width, holes),
        "name": f"synthetic-{seed}",
        "spec": "synthetic:",
        "path": f"/synthetic/{seed}.png",
    }
    return Record(**{**fields, **changes})


def depth_ends(depth: np.ndarray) -> tuple[float, float]:
    """The depths that become 0 and 1: percentiles of the valid pixels on the even grid.

    Of large maps it holds some 65,000 pixels; where few of those are valid, all pixels count.
    """
    step = max(1, round((depth.size / 65_536) ** 0.5))
    on_grid = np.isfinite(depth)
    on_grid[np.arange(depth.shape[0]) % step != 0] = False
    on_grid[:, np.arange(depth.shape[1]) % step != 0] = False
    if on_grid.sum() < 1024:
        on_grid = np.isfinite(depth)
    low, high = np.percentile(depth[on_grid].astype(float), (0.5, 99.5))
    return float(low), float(high)


def assert_even(counts: Mapping[Any, int], total: int, kinds: int, tolerance: float = 0.3) -> None:
    """Every one of `kinds` outcomes came up, about equally often."""
    assert len(counts) == kinds, sorted(counts)
    for name, count in counts.items():
        assert abs(count * kinds / total - 1) < tolerance, (name, count, total / kinds)
