"""Supervised fine-tuning: responses in the required format, several examples packed in a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.items import Item
from spatial_ssrl_jax.data.packing import Group, RowShape, fill_rows
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.parallel.collectives import all_sum
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig, VisionConfig
from spatial_ssrl_jax.rl.batch import PackedBatch
from spatial_ssrl_jax.rl.row_shapes import MicroBatch, pack_micro_batches
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
            "raise it, or shorten or remove the response."
        )


@dataclass(frozen=True)
class PackedStep:
    """An optimizer step's micro-batches, each filled only when it is iterated over.

    Attributes:
      groups: this process's part of the step, prompts with one response each.
      micro_batches: which groups are in the rows of each.
      normaliser: response tokens of the whole step.
      vision: the vision tower's shape.
    """

    groups: list[Group]
    micro_batches: list[MicroBatch]
    normaliser: float
    vision: VisionConfig

    def __iter__(self) -> Iterator[PackedBatch[np.ndarray]]:
        """The micro-batches with this process's rows."""
        for part in self.micro_batches:
            rows, _ = fill_rows(self.groups, part.rows, part.shape, self.vision)
            weight = (rows.place >= 0) / np.float32(self.normaliser)
            yield PackedBatch(rows, weight, np.asarray(self.normaliser, np.float32))

    @property
    def padded_tokens(self) -> int:
        """Tokens of this process's rows, padding included."""
        return sum(part.padded_tokens for part in self.micro_batches)


def pack_step(
    batch: Batch,
    responses: Sequence[np.ndarray],
    shapes: Sequence[RowShape],
    micro_batch_rows: int,
    model: QwenVLConfig,
) -> PackedStep:
    """Packs a step's examples; each process packs its own.

    Args:
      batch: this process's part of the step.
      responses: what to learn for each of its items.
      shapes: of rows.
      micro_batch_rows: rows of a micro-batch on all processes.
      model: the model's shape.

    Raises:
      UserError: an example is larger than a row.
    """
    groups = [Group(*pair) for pair in zip(batch.prompts, ([r] for r in responses), strict=True)]
    contents = [group.content for group in groups]
    micro_batches = pack_micro_batches(contents, shapes, micro_batch_rows, model)
    normaliser = all_sum(sum(map(len, responses)))
    return PackedStep(groups, micro_batches, normaliser, model.vision)
