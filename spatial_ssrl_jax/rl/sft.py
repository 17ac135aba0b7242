"""Supervised fine-tuning: responses in the required format, several examples packed in a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import SftSettings
from spatial_ssrl_jax.data.batching import smallest_bucket
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.packing import (
    PackedExample,
    RowCapacity,
    assign_rows,
    fill_rows,
)
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.parallel.collectives import all_gather, all_sum
from spatial_ssrl_jax.qwen_vl.config import VisionConfig
from spatial_ssrl_jax.rl.batch import PackedBatch
from spatial_ssrl_jax.tasks.protocol import response_text


def encode_responses(items: Sequence[Item], processor: Processor, limit: int) -> list[np.ndarray]:
    """The tokens to learn for each item, end token included.

    A response that comes with the data is used as it is; else one is composed of the example's
    reason and answer.

    Raises:
      UserError: a response has more than `limit` tokens.
    """
    responses = []
    for example in (item.example for item in items):
        text = example.response or response_text(example.reason, example.answer)
        responses.append(processor.encode_response(text))
        check_response(len(responses[-1]), limit, example.source["record"])
    return responses


def check_response(tokens: int, limit: int, name: str) -> None:
    """Raises `UserError` where a response to learn has more than `limit` tokens."""
    if tokens > limit:
        raise UserError(
            f"the response of {name} has {tokens} tokens, above rollout.max_new_tokens={limit}: "
            "raise it with sft.row_responses and sft.row_tokens, or shorten or remove the response."
        )


@dataclass(frozen=True)
class PackedStep:
    """An optimizer step's micro-batches, each filled only when it is iterated over.

    Attributes:
      examples: this process's part of the step.
      rows: the examples of each row of each micro-batch; all processes have equally many rows,
        some perhaps empty.
      capacities: the rows' shape in each micro-batch.
      normaliser: response tokens of the whole step.
      vision: the vision tower's shape.
    """

    examples: list[PackedExample]
    rows: list[list[list[int]]]
    capacities: list[RowCapacity]
    normaliser: float
    vision: VisionConfig

    def __iter__(self) -> Iterator[PackedBatch[np.ndarray]]:
        """The micro-batches with this process's rows."""
        vision = self.vision
        sizes = vision.patch_dim, vision.window_patches, vision.merge_unit
        for rows, capacity in zip(self.rows, self.capacities, strict=True):
            packed = fill_rows(self.examples, rows, capacity, *sizes)
            yield PackedBatch(packed, np.asarray(self.normaliser, np.float32))

    @property
    def padded_tokens(self) -> int:
        """Tokens of this process's rows, padding included."""
        pairs = zip(self.rows, self.capacities, strict=True)
        return sum(len(rows) * capacity.tokens for rows, capacity in pairs)


def pack_step(
    batch: Batch, responses: Sequence[np.ndarray], settings: SftSettings, vision: VisionConfig
) -> PackedStep:
    """Packs a step's examples; each process packs its own.

    Args:
      batch: this process's part of the step.
      responses: what to learn for each of its items.
      settings: the config's `sft` section.
      vision: the vision tower's shape.

    Raises:
      UserError: an example is larger than a row.
    """
    examples = [PackedExample(*pair) for pair in zip(batch.prompts, responses, strict=True)]
    row = RowCapacity(settings.row_tokens, max(settings.row_windows), settings.row_responses)
    rows = assign_rows([example.size for example in examples], row)
    size = settings.micro_batch_rows // jax.process_count()
    count = int(all_gather(np.array([-(-len(rows) // size)])).max())
    rows += [[] for _ in range(count * size - len(rows))]
    micro_batches = [rows[first : first + size] for first in range(0, len(rows), size)]
    windows = [max(sum(examples[i].size.windows for i in r) for r in m) for m in micro_batches]
    capacities = [
        RowCapacity(
            row.tokens,
            smallest_bucket(largest, settings.row_windows, "sft.row_windows"),
            row.responses,
        )
        for largest in all_gather(np.array([windows])).max(axis=0).tolist()
    ]
    normaliser = all_sum(sum(map(len, responses)))
    return PackedStep(examples, micro_batches, capacities, normaliser, vision)
