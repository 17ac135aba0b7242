"""Cutting a step's prompts into pieces of like length, each in the smallest bucket."""

from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.batching import smallest_bucket
from spatial_ssrl_jax.parallel.collectives import all_gather


@dataclass(frozen=True)
class BatchShape:
    """What a piece is padded to.

    Attributes:
      tokens: of each prompt.
      windows: vision windows of each prompt.
      response: tokens of each response; 0 before there are any.
    """

    tokens: int
    windows: int
    response: int


@dataclass(frozen=True)
class Buckets:
    """Sizes that programs are compiled for.

    Attributes:
      prompt, window: the config's `data.prompt_buckets` and `data.window_buckets`.
      response: widths of responses; the last one is the longest response there can be.
    """

    prompt: tuple[int, ...]
    window: tuple[int, ...]
    response: tuple[int, ...]

    @classmethod
    def of(cls, config: Config) -> "Buckets":
        """The config's; widths of responses are multiples of `rollout.kv_block` where none are named.

        Widths above `rollout.max_new_tokens` are left out, and the limit itself is always one.
        """
        limit, chunk = config.rollout.max_new_tokens, config.rollout.kv_block
        named = config.grpo.response_buckets or range(chunk, limit, chunk)
        response = (*sorted(width for width in named if width < limit), limit)
        return cls(config.data.prompt_buckets, config.data.window_buckets, response)

    def shape(self, tokens: int, windows: int, response: int) -> BatchShape:
        """The smallest shape that holds the given sizes."""
        return BatchShape(
            smallest_bucket(tokens, self.prompt, "data.prompt_buckets"),
            smallest_bucket(windows, self.window, "data.window_buckets"),
            smallest_bucket(response, self.response, "rollout.max_new_tokens") if response else 0,
        )


@dataclass(frozen=True)
class BatchSlice:
    """Prompts that go through a program together.

    Attributes:
      rows: [r] int64, which of this process's prompts.
      shape: what they are padded to; the same on all processes.
    """

    rows: np.ndarray
    shape: BatchShape

    def places(self, group: int) -> int:
        """Token places that it computes, prompts and `group` responses each."""
        return len(self.rows) * (self.shape.tokens + group * self.shape.response)


def bucket_by_length(sizes: np.ndarray, rows: int, buckets: Buckets) -> list[BatchSlice]:
    """Sorts this process's prompts by length and cuts them into pieces.

    Prompts of one bucket come together, and among them those whose longest responses are alike: by
    the sum of both, a short prompt with long responses would share a piece with a long prompt with
    short ones, and be padded twice.

    Args:
      sizes: [n, 3] tokens, vision windows, and tokens of the longest response of each prompt.
      rows: prompts of a piece on this process; divides n.
      buckets: sizes to pad to.

    Returns:
      n / rows pieces, shortest prompts first.
    """
    tokens = [smallest_bucket(size, buckets.prompt, "data.prompt_buckets") for size in sizes[:, 0]]
    order = np.lexsort((sizes[:, 2], tokens)).reshape(-1, rows)
    largest = all_gather(sizes[order].max(axis=1)[None]).max(axis=0)
    return [
        BatchSlice(piece, buckets.shape(*size))
        for piece, size in zip(order, largest.tolist(), strict=True)
    ]
