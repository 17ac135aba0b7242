"""Where each patch goes: attention windows, merged tokens and M-RoPE positions, all on the host.

A grid is `(t, h, w)`: temporal frames, patch rows, patch columns. A processor lists a grid's
patches merged token by merged token, row by row; here they are laid out in padded windows.
"""

from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.qwen2_5_vl.config import VisionConfig

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class WindowLayout:
    """The windows of one prompt's pictures.

    Attributes:
      source: [W, S] int32, which of the processor's patches stands in each slot; -1 is padding.
      frame: [W, S] int32, which picture or temporal frame; -1 is padding.
      coords: [W, S, 2] int32, row and column of the patch in its picture.
      merged: [n] int32, slot among the W·S/4 merged ones for each merged token in reading order.
    """

    source: np.ndarray
    frame: np.ndarray
    coords: np.ndarray
    merged: np.ndarray


def window_count(config: VisionConfig, grids: list[Grid]) -> int:
    """Windows that the pictures fill, known from their sizes alone."""
    side = config.window_side * config.spatial_merge_size
    return sum(t * -(-h // side) * -(-w // side) for t, h, w in grids)


def merged_tokens(config: VisionConfig, grid: Grid) -> int:
    """Tokens that a picture takes in the prompt."""
    return grid[0] * grid[1] * grid[2] // config.merge_unit


def lay_out_windows(config: VisionConfig, grids: list[Grid]) -> WindowLayout:
    """Lays the patches of a prompt's pictures out in windows of `config.window_patches` slots."""
    total = window_count(config, grids)
    size, unit, side = config.window_patches, config.merge_unit, config.window_side
    source = np.full((total, size // unit, unit), -1, np.int32)
    frame = np.full((total, size // unit, unit), -1, np.int32)
    coords = np.zeros((total, size // unit, unit, 2), np.int32)
    merged, first_window, first_patch, first_frame = [], 0, 0, 0
    merge = config.spatial_merge_size
    inside = np.stack(np.divmod(np.arange(unit), merge), axis=-1)
    for t, h, w in grids:
        time, row, column = (
            a.ravel()
            for a in np.meshgrid(*map(np.arange, (t, h // merge, w // merge)), indexing="ij")
        )
        across, down = -(-(w // merge) // side), -(-(h // merge) // side)
        window = first_window + (time * down + row // side) * across + column // side
        slot = row % side * side + column % side
        token = np.arange(len(time))
        source[window, slot] = first_patch + token[:, None] * unit + np.arange(unit)
        frame[window, slot] = (first_frame + time)[:, None]
        coords[window, slot] = np.stack((row, column), axis=-1)[:, None] * merge + inside
        merged.append(window * (size // unit) + slot)
        first_window += t * down * across
        first_patch += t * h * w
        first_frame += t
    return WindowLayout(
        source.reshape(total, size),
        frame.reshape(total, size),
        coords.reshape(total, size, 2),
        np.concatenate(merged).astype(np.int32) if merged else np.zeros(0, np.int32),
    )


def mrope_positions(
    config: VisionConfig,
    is_vision: np.ndarray,
    grids: list[Grid],
    seconds_per_grid: list[float | None],
) -> np.ndarray:
    """M-RoPE positions of a prompt.

    Args:
      config: the vision tower's shape.
      is_vision: [T] bool, the tokens that pictures and videos fill.
      grids: their grids in prompt order.
      seconds_per_grid: seconds between temporal frames of each video, None for a picture.

    Returns:
      [3, T] int32: temporal, height and width position of each token.
    """
    position = np.zeros((3, len(is_vision)), np.int32)
    place, current = 0, 0
    remaining = iter(zip(grids, seconds_per_grid, strict=True))
    while place < len(is_vision):
        if not is_vision[place]:
            end = place + int(np.argmax(np.append(is_vision[place:], True)))
            position[:, place:end] = current + np.arange(end - place)
            current += end - place
        else:
            grid, seconds = next(remaining)
            t, h, w = (
                grid[0],
                grid[1] // config.spatial_merge_size,
                grid[2] // config.spatial_merge_size,
            )
            end = place + t * h * w
            # In float32 like the reference, for a product may round to the next whole position.
            step = np.float32(1 if seconds is None else config.tokens_per_second)
            step *= np.float32(1 if seconds is None else seconds)
            time = (np.arange(t, dtype=np.float32) * step).astype(np.int64)
            time, row, column = np.meshgrid(time, np.arange(h), np.arange(w), indexing="ij")
            position[:, place:end] = current + np.stack((time, row, column)).reshape(3, -1)
            # As in Transformers 5; its first Qwen2.5-VL went on behind the last time where that is
            # later, which differs for a video that is longer than it is large.
            current += max(h, w)
        place = end
    return position
