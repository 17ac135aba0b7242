"""Prompts of given sizes for timings: random pixels and words."""

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.family import member_of
from spatial_ssrl_jax.qwen_vl.inputs import Grid, merged_tokens


def synthetic_prompt(config: QwenVLConfig, tokens: int, grid: Grid) -> Prompt:
    """One image of random pixels, then words.

    Args:
      config: the model's shape.
      tokens: of the whole prompt.
      grid: patch grid of the image; its sides are even.

    Raises:
      UserError: the image does not fit into the prompt, or its grid is odd.
    """
    image = merged_tokens(config.vision, grid)
    if tokens <= image + 2 or grid[1] % 2:
        raise UserError(
            f"--prompt-tokens={tokens} and --grid={grid[1]} do not fit: the grid must be even and "
            f"its image alone takes {image + 2} tokens."
        )
    member, rng = member_of(config), np.random.default_rng(0)
    ids = [config.vision_start_token_id, *[config.image_token_id] * image]
    ids += [config.vision_end_token_id]
    words = rng.integers(0, min(config.text.vocab_size // 2, 10_000), tokens - len(ids))
    ids = np.array([*ids, *words], np.int32)
    is_vision = ids == config.image_token_id
    position = member.mrope_positions(config.vision, is_vision, [grid], [None])
    layout = member.lay_out_patches(config.vision, [grid])
    index = np.full(len(ids), -1, np.int32)
    index[is_vision] = layout.merged
    pixels = rng.integers(0, 256, (len(layout.source), config.vision.patch_dim), np.uint8)
    return Prompt(
        ids, position, int(position.max()) + 1, index, pixels, layout.frame, layout.coords
    )
