"""The cold start: supervised responses in the required form, several examples in a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from spatial_ssrl_jax.config.schema import SftSettings
from spatial_ssrl_jax.data.batching import smallest_bucket
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.packing import (
    PackedExample,
    RowCapacity,
    assign_rows,
    fill_rows,
    unpad_prompt,
)
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.parallel.collectives import all_gather, all_sum
from spatial_ssrl_jax.qwen_vl.config import VisionConfig
from spatial_ssrl_jax.rl.batch import PackedBatch
from spatial_ssrl_jax.tasks.protocol import response_text


def encode_responses(items: Sequence[Item], processor: Processor, limit: int) -> list[np.ndarray]:
    """The tokens to learn for each item, end token included.

    A response that the data brings is learned from as it is; else one is made of the example's
    reason and answer.

    Raises:
      UserError: a response has more than `limit` tokens.
    """
    texts = (i.example.response or response_text(i.example.reason, i.example.answer) for i in items)
    responses = [processor.encode_response(text) for text in texts]
    smallest_bucket(max(map(len, responses)), (limit,), "rollout.max_new_tokens")
    return responses


@dataclass(frozen=True)
class PackedStep:
    """An optimizer step's micro-batches, each filled only when it is iterated over.

    Attributes:
      examples: this process's part of the step.
      parts: the examples of each row of each micro-batch; all processes have equally many rows,
        some perhaps empty.
      rooms: the rows' shape in each micro-batch.
      normaliser: response tokens of the whole step.
      vision: the vision tower's shape.
      dtype: of the patches; the same on all processes, also on one that has no example.
    """

    examples: list[PackedExample]
    parts: list[list[list[int]]]
    rooms: list[RowCapacity]
    normaliser: float
    vision: VisionConfig
    dtype: np.dtype

    def __iter__(self) -> Iterator[PackedBatch]:
        """The micro-batches with this process's rows, NumPy arrays."""
        vision = self.vision
        sizes = vision.patch_dim, vision.window_patches, vision.merge_unit
        for rows, room in zip(self.parts, self.rooms, strict=True):
            packed = fill_rows(self.examples, rows, room, *sizes, dtype=self.dtype)
            yield PackedBatch(packed, np.float32(self.normaliser))

    @property
    def places(self) -> int:
        """Token places of this process's rows, with and without a token."""
        return sum(len(r) * m.tokens for r, m in zip(self.parts, self.rooms, strict=True))


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
    prompts = (unpad_prompt(batch.prompts, row) for row in range(len(batch.items)))
    examples = [PackedExample(*pair) for pair in zip(prompts, responses, strict=True)]
    room = RowCapacity(settings.row_tokens, max(settings.row_windows), settings.row_responses)
    rows = assign_rows([example.size for example in examples], room)
    height = settings.micro_batch_rows // jax.process_count()
    count = int(all_gather(np.array([-(-len(rows) // height)])).max())
    rows += [[] for _ in range(count * height - len(rows))]
    parts = [rows[first : first + height] for first in range(0, len(rows), height)]
    windows = [max(sum(examples[i].size.windows for i in r) for r in part) for part in parts]
    rooms = [
        RowCapacity(
            room.tokens,
            smallest_bucket(most, settings.row_windows, "sft.row_windows"),
            room.responses,
        )
        for most in all_gather(np.array([windows])).max(axis=0).tolist()
    ]
    normaliser, dtype = all_sum(sum(map(len, responses))), batch.prompts.vision.patches.dtype
    return PackedStep(examples, parts, rooms, normaliser, vision, dtype)
