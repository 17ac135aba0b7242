"""Padding prompts to static shapes."""

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch, VisionInput


def smallest_bucket(size: int, buckets: Sequence[int], name: str) -> int:
    """The smallest bucket that holds `size`.

    Raises:
      UserError: none does; `name` is the setting to change.
    """
    for limit in sorted(buckets):
        if size <= limit:
            return limit
    raise UserError(f"{name}={tuple(buckets)} has no bucket for {size}: add a larger one.")


def pad_prompts(
    prompts: Sequence[Prompt],
    prompt_buckets: Sequence[int],
    window_buckets: Sequence[int],
    dtype: str = "float32",
) -> PromptBatch[np.ndarray]:
    """Stacks prompts as NumPy arrays, padded to the smallest buckets that hold all of them.

    Args:
      prompts: at least one.
      prompt_buckets, window_buckets: tokens and vision windows to choose from.
      dtype: of the patches: the compute dtype, to which the model rounds them first in any case.
        They are the larger part of a batch.

    Raises:
      UserError: no bucket holds the longest prompt.
    """
    tokens = smallest_bucket(
        max(len(p.ids) for p in prompts), prompt_buckets, "data.prompt_buckets"
    )
    windows = smallest_bucket(
        max(len(p.frame) for p in prompts), window_buckets, "data.window_buckets"
    )

    def stack(
        name: str, length: int, axis: int = 0, fill: int = 0, dtype: np.dtype | None = None
    ) -> np.ndarray:
        padded = []
        for prompt in prompts:
            array = np.asarray(getattr(prompt, name), dtype)
            width = [(0, 0)] * array.ndim
            width[axis] = (0, length - array.shape[axis])
            padded.append(np.pad(array, width, constant_values=fill))
        return np.stack(padded)

    return PromptBatch(
        ids=stack("ids", tokens),
        length=np.array([len(p.ids) for p in prompts], np.int32),
        position=stack("position", tokens, axis=1),
        next_position=np.array([p.next_position for p in prompts], np.int32),
        image_index=stack("image_index", tokens, fill=-1),
        vision=VisionInput(
            patches=stack("patches", windows, dtype=jnp.dtype(dtype)),
            frame=stack("frame", windows, fill=-1),
            coords=stack("coords", windows),
        ),
    )


def widen(prompts: PromptBatch[np.ndarray], tokens: int, windows: int) -> PromptBatch[np.ndarray]:
    """The same prompts in a bucket of T=`tokens` and W=`windows`, at least as large as theirs."""

    def pad(x: np.ndarray, size: int, axis: int, fill: int = 0) -> np.ndarray:
        width = [(0, 0)] * x.ndim
        width[axis] = (0, size - x.shape[axis])
        return np.pad(x, width, constant_values=fill)

    vision = prompts.vision
    return replace(
        prompts,
        ids=pad(prompts.ids, tokens, 1),
        position=pad(prompts.position, tokens, 2),
        image_index=pad(prompts.image_index, tokens, 1, -1),
        vision=VisionInput(
            patches=pad(vision.patches, windows, 1),
            frame=pad(vision.frame, windows, 1, -1),
            coords=pad(vision.coords, windows, 1),
        ),
    )


def windows_of(prompts: PromptBatch[np.ndarray]) -> np.ndarray:
    """[B] int64, vision windows of each prompt, without padding."""
    return (prompts.vision.frame >= 0).any(axis=-1).sum(axis=1)


def trim(
    prompts: PromptBatch[np.ndarray], rows: np.ndarray, tokens: int, windows: int
) -> PromptBatch[np.ndarray]:
    """Some of the prompts in a smaller bucket; the reverse of `widen`.

    Rows and bucket are sliced at once, so that only the patches that are kept are copied.

    Args:
      prompts: B prompts.
      rows: [r] int, which of them.
      tokens, windows: the bucket.

    Raises:
      ValueError: the bucket does not hold them.
    """
    vision = prompts.vision
    if prompts.length[rows].max() > tokens or (vision.frame[rows, windows:] >= 0).any():
        raise ValueError(
            f"a bucket of {tokens} tokens and {windows} windows is too small for the prompts."
        )
    return PromptBatch(
        ids=prompts.ids[rows, :tokens],
        length=prompts.length[rows],
        position=prompts.position[rows, :, :tokens],
        next_position=prompts.next_position[rows],
        image_index=prompts.image_index[rows, :tokens],
        vision=VisionInput(
            patches=vision.patches[rows, :windows],
            frame=vision.frame[rows, :windows],
            coords=vision.coords[rows, :windows],
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
