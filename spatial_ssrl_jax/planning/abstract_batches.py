"""Batches of a run at its largest buckets, as shapes and shardings."""

from dataclasses import dataclass

import jax
import numpy as np
from jax import ShapeDtypeStruct
from jax.typing import DTypeLike

from spatial_ssrl_jax.config.schema import Config, GrpoSettings, SftSettings
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import PackedRows, PromptBatch, VisionInput
from spatial_ssrl_jax.rl.batch import GroupBatch, PackedBatch
from spatial_ssrl_jax.rollout.sampling import sample_keys


@dataclass(frozen=True)
class AbstractBatches:
    """Makes the batches of a run.

    Attributes:
      config: the run.
      model: the model's shape.
      layout: for training.
    """

    config: Config
    model: QwenVLConfig
    layout: Layout

    def rows(self, *shape: int, dtype: DTypeLike = np.int32) -> ShapeDtypeStruct:
        """An array whose first axis is the batch's."""
        return ShapeDtypeStruct(shape, dtype, sharding=self.layout.batch_sharding())

    def prompts(self, rows: int) -> PromptBatch[ShapeDtypeStruct]:
        """As many prompts, each of the largest buckets."""
        tokens = max(self.config.data.prompt_buckets)
        return PromptBatch(
            ids=self.rows(rows, tokens),
            length=self.rows(rows),
            position=self.rows(rows, 3, tokens),
            next_position=self.rows(rows),
            image_index=self.rows(rows, tokens),
            vision=self._vision(rows, max(self.config.data.window_buckets)),
        )

    def packed(self, settings: SftSettings) -> PackedBatch[ShapeDtypeStruct]:
        """A micro-batch of SFT."""
        rows, tokens = settings.micro_batch_rows, settings.row_tokens
        packed = PackedRows(
            ids=self.rows(rows, tokens),
            segment=self.rows(rows, tokens),
            position=self.rows(rows, 3, tokens),
            image_index=self.rows(rows, tokens),
            place=self.rows(rows, settings.row_responses),
            vision=self._vision(rows, max(settings.row_windows)),
        )
        return PackedBatch(packed, self.scalar())

    def groups(self, settings: GrpoSettings) -> GroupBatch[ShapeDtypeStruct]:
        """A micro-batch of GRPO, without old and reference log-probabilities."""
        rows, group = settings.micro_batch_prompts, settings.group_size
        limit = self.config.rollout.max_new_tokens
        return GroupBatch(
            prompts=self.prompts(rows),
            tokens=self.rows(rows, group, limit),
            length=self.rows(rows, group),
            weight=self.rows(rows, group, dtype=np.float32),
            normaliser=self.scalar(),
            advantage=self.rows(rows, group, dtype=np.float32),
            sampled_logprobs=self.rows(rows, group, limit, dtype=np.float32),
            old_logprobs=None,
            reference_logprobs=None,
        )

    def keys(self, rows: int, group: int) -> ShapeDtypeStruct:
        """[rows, group] keys of the samples."""
        index = ShapeDtypeStruct((rows,), np.int32)
        keys = jax.eval_shape(lambda i: sample_keys(jax.random.key(0), i, group), index)
        return self.rows(*keys.shape, dtype=keys.dtype)

    def scalar(self, dtype: DTypeLike = np.float32) -> ShapeDtypeStruct:
        """A replicated scalar."""
        return ShapeDtypeStruct((), dtype, sharding=self.layout.replicated())

    def _vision(self, rows: int, windows: int) -> VisionInput[ShapeDtypeStruct]:
        shape = (rows, windows, self.model.vision.window_patches)
        patches = self.rows(*shape, self.model.vision.patch_dim, dtype=np.uint8)
        return VisionInput(patches, self.rows(*shape), self.rows(*shape, 2))
