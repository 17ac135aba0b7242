"""Padding prompts to static shapes."""

from collections.abc import Sequence

import numpy as np

from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch, VisionInput


def prompt_sizes(prompts: Sequence[Prompt]) -> np.ndarray:
    """[B, 2] int64, tokens and patches of each prompt."""
    return np.array([(len(p.ids), len(p.frame)) for p in prompts], np.int64).reshape(-1, 2)


def pad_prompts(prompts: Sequence[Prompt], tokens: int, patches: int) -> PromptBatch[np.ndarray]:
    """Stacks prompts as NumPy arrays, padded to one shape.

    Args:
      prompts: at least one.
      tokens, patches: T and P, at least those of every prompt.

    Raises:
      ValueError: a prompt is larger.
    """
    if (prompt_sizes(prompts).max(axis=0) > (tokens, patches)).any():
        raise ValueError(f"{tokens} tokens and {patches} patches are too few for the prompts.")

    def stack(name: str, length: int, axis: int = 0, fill: int = 0) -> np.ndarray:
        arrays = [getattr(prompt, name) for prompt in prompts]
        shape = list(arrays[0].shape)
        shape[axis] = length
        padded = np.empty((len(prompts), *shape), arrays[0].dtype)
        for row, array in zip(padded, arrays, strict=True):
            used, rest = np.split(row, array.shape[axis : axis + 1], axis)
            used[...], rest[...] = array, fill
        return padded

    return PromptBatch(
        ids=stack("ids", tokens),
        length=np.array([len(p.ids) for p in prompts], np.int32),
        position=stack("position", tokens, axis=1),
        next_position=np.array([p.next_position for p in prompts], np.int32),
        image_index=stack("image_index", tokens, fill=-1),
        vision=VisionInput(
            patches=stack("patches", patches),
            frame=stack("frame", patches, fill=-1),
            coords=stack("coords", patches),
        ),
    )


def pad_responses(
    responses: Sequence[Sequence[np.ndarray]], max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pads the responses of B groups of G.

    Args:
      responses: B lists of G arrays [r] int32.
      max_tokens: R, tokens to pad to.

    Returns:
      [B, G, R] int32 tokens and [B, G] int32 lengths.
    """
    length = np.array([[len(r) for r in group] for group in responses], np.int32)
    tokens = np.zeros((*length.shape, max_tokens), np.int32)
    for b, group in enumerate(responses):
        for g, response in enumerate(group):
            tokens[b, g, : len(response)] = response
    return tokens, length
