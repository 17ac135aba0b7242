"""Bucketing by length: a step's prompts as batches of like length, each in the smallest bucket."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.batching import pad_prompts, smallest_bucket
from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.parallel.collectives import all_gather
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch


@dataclass(frozen=True)
class BatchShape:
    """What the prompts of a batch are padded to.

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
        """The config's; without `grpo.response_buckets` multiples of `rollout.kv_block`.

        Widths above `rollout.max_new_tokens` are left out, and that itself is always one.
        """
        limit, block = config.rollout.max_new_tokens, config.rollout.kv_block
        named = config.grpo.response_buckets or range(block, limit, block)
        response = (*sorted(width for width in named if width < limit), limit)
        return cls(config.data.prompt_buckets, config.data.window_buckets, response)

    def shape(self, tokens: int, windows: int, response: int) -> BatchShape:
        """The smallest shape that holds the given sizes.

        Raises:
          UserError: no bucket does.
        """
        return BatchShape(
            smallest_bucket(tokens, self.prompt, "data.prompt_buckets"),
            smallest_bucket(windows, self.window, "data.window_buckets"),
            smallest_bucket(response, self.response, "rollout.max_new_tokens") if response else 0,
        )


@dataclass(frozen=True)
class BatchSlice:
    """Prompts that go through a program together: a micro-batch, or a rollout batch.

    Attributes:
      rows: [r] int64, which of this process's prompts.
      shape: what they are padded to; the same on all processes.
    """

    rows: np.ndarray
    shape: BatchShape

    def pad(self, prompts: Sequence[Prompt]) -> PromptBatch[np.ndarray]:
        """Its rows of this process's prompts, padded to its shape."""
        members = [prompts[row] for row in self.rows]
        return pad_prompts(members, self.shape.tokens, self.shape.windows)

    def padded_tokens(self, group_size: int) -> int:
        """Tokens that it computes, padding included: prompts with `group_size` responses each."""
        return len(self.rows) * (self.shape.tokens + group_size * self.shape.response)


def fill_batches(wanted: np.ndarray, sizes: np.ndarray, rows: int) -> np.ndarray:
    """The wanted prompts, and the smallest others that fill up their last batch.

    All processes get equally many batches, as many as the one with most wanted prompts needs.

    Args:
      wanted: [n] bool, of this process's prompts.
      sizes: [n, 3] as those of `bucket_by_length`.
      rows: prompts of a batch on this process; divides n.

    Returns:
      Their indices, whole batches of them.
    """
    others = np.flatnonzero(~wanted)
    others = others[np.lexsort(sizes[others].T[::-1])]
    batches = all_gather(np.array([-(-int(wanted.sum()) // rows)])).max()
    chosen = np.concatenate((np.flatnonzero(wanted), others))
    return np.sort(chosen[: batches * rows])


def bucket_by_length(sizes: np.ndarray, rows: int, buckets: Buckets) -> list[BatchSlice]:
    """Sorts this process's prompts by length and splits them into batches.

    Prompts of one bucket come together, and among them those whose longest responses are alike: by
    the sum of both, a short prompt with long responses would share a batch with a long prompt with
    short ones, and be padded twice.

    Args:
      sizes: [n, 3] tokens, vision windows, and tokens of the longest response of each prompt;
        [n, 2] before there are responses.
      rows: prompts of a batch on this process; divides n.
      buckets: sizes to pad to.

    Returns:
      n / rows batches, shortest prompts first.
    """
    sizes = np.pad(sizes, ((0, 0), (0, 3 - sizes.shape[1])))
    tokens = [smallest_bucket(n, buckets.prompt, "data.prompt_buckets") for n in sizes[:, 0]]
    order = np.lexsort((sizes[:, 2], np.array(tokens))).reshape(-1, rows)
    largest = all_gather(sizes[order].max(axis=1)[None]).max(axis=0)
    return [
        BatchSlice(members, buckets.shape(*size))
        for members, size in zip(order, largest.tolist(), strict=True)
    ]
