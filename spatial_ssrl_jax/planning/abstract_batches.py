"""Batches of a run as shapes and shardings."""

from dataclasses import dataclass

import jax
import numpy as np
from jax import ShapeDtypeStruct
from jax.typing import DTypeLike

from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.packing import RowShape
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch, VisionInput
from spatial_ssrl_jax.rl.batch import PackedBatch
from spatial_ssrl_jax.rl.bucketing import BatchShape
from spatial_ssrl_jax.rl.row_shapes import empty_group_batch, empty_packed_batch
from spatial_ssrl_jax.rl.stages import GrpoStage, SftStage
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

    def prompts(self, rows: int, bucket: BatchShape | None = None) -> PromptBatch[ShapeDtypeStruct]:
        """As many prompts, each of a bucket; None is the largest."""
        bucket = bucket or BatchShape(*self.config.data.buckets[-1])
        tokens, patches = bucket.tokens, bucket.patches
        return PromptBatch(
            ids=self.rows(rows, tokens),
            length=self.rows(rows),
            position=self.rows(rows, 3, tokens),
            next_position=self.rows(rows),
            image_index=self.rows(rows, tokens),
            vision=self._vision(rows, patches),
        )

    def packed(self, stage: SftStage | GrpoStage, shape: RowShape) -> PackedBatch[ShapeDtypeStruct]:
        """A micro-batch of a stage, without old and reference log-probabilities."""
        is_grpo = isinstance(stage, GrpoStage)
        one = (empty_group_batch if is_grpo else empty_packed_batch)(shape, self.model.vision)
        return self.layout.abstract_batch(one, stage.settings.micro_batch_rows)

    def keys(self, rows: int, group: int) -> ShapeDtypeStruct:
        """[rows, group] keys of the samples."""
        index = ShapeDtypeStruct((rows,), np.int32)
        keys = jax.eval_shape(lambda i: sample_keys(jax.random.key(0), i, group), index)
        return self.rows(*keys.shape, dtype=keys.dtype)

    def scalar(self, dtype: DTypeLike = np.float32) -> ShapeDtypeStruct:
        """A replicated scalar."""
        return ShapeDtypeStruct((), dtype, sharding=self.layout.replicated())

    def _vision(self, rows: int, patches: int) -> VisionInput[ShapeDtypeStruct]:
        pixels = self.rows(rows, patches, self.model.vision.patch_dim, dtype=np.uint8)
        return VisionInput(pixels, self.rows(rows, patches), self.rows(rows, patches, 2))
