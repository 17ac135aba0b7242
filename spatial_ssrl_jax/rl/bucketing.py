"""Bucketing by length: prompts as batches of like length, each in the smallest bucket."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.parallel.collectives import all_gather
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch


@dataclass(frozen=True)
class BatchShape:
    """What the prompts of a batch are padded to.

    Attributes:
      tokens: of each prompt.
      patches: of the images of each prompt.
    """

    tokens: int
    patches: int


@dataclass(frozen=True)
class Buckets:
    """Sizes of prompts that programs are compiled for.

    Attributes:
      shapes: the config's `data.buckets`, ascending.
    """

    shapes: tuple[BatchShape, ...]

    @classmethod
    def of(cls, config: Config) -> "Buckets":
        """The config's."""
        return cls(tuple(BatchShape(*size) for size in config.data.buckets))

    def shape(self, tokens: int, patches: int) -> BatchShape:
        """The smallest shape that holds the given sizes.

        Raises:
          UserError: no bucket does.
        """
        for shape in self.shapes:
            if tokens <= shape.tokens and patches <= shape.patches:
                return shape
        sizes = ", ".join(f"{s.tokens} with {s.patches}" for s in self.shapes)
        raise UserError(
            f"no bucket holds a prompt of {tokens} tokens with {patches} patches (there are "
            f"{sizes}): add a larger one to data.prompt_buckets and data.patch_buckets."
        )


@dataclass(frozen=True)
class BatchSlice:
    """Prompts that are prefilled together.

    Attributes:
      rows: [r] int64, which of this process's prompts.
      shape: what they are padded to; the same on all processes.
    """

    rows: np.ndarray
    shape: BatchShape

    def pad(self, prompts: Sequence[Prompt]) -> PromptBatch[np.ndarray]:
        """Its rows of this process's prompts, padded to its shape."""
        members = [prompts[row] for row in self.rows]
        return pad_prompts(members, self.shape.tokens, self.shape.patches)


def bucket_by_length(sizes: np.ndarray, rows: int, buckets: Buckets) -> list[BatchSlice]:
    """Sorts this process's prompts by length and splits them into batches.

    Args:
      sizes: [n, 2] tokens and patches of each prompt.
      rows: prompts of a batch on this process; divides n.
      buckets: sizes to pad to.

    Returns:
      n / rows batches, shortest prompts first.
    """
    order = np.argsort(sizes[:, 0], kind="stable").reshape(-1, rows)
    largest = all_gather(sizes[order].max(axis=1)[None]).max(axis=0)
    return [
        BatchSlice(members, buckets.shape(*size))
        for members, size in zip(order, largest.tolist(), strict=True)
    ]
