"""The programs of GRPO's updates, compiled in a thread before their micro-batches come.

Before a stage's first rollout its prompts are known, and the longest responses there can be are
expected. Afterwards the next ones are expected to be a bucket shorter or longer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax import Array, ShapeDtypeStruct

from spatial_ssrl_jax.config.schema import GrpoSettings
from spatial_ssrl_jax.data.batching import prompt_sizes
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.parallel import offload
from spatial_ssrl_jax.parallel.compile_ahead import CompileAhead, abstract, compile_abstract
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.inputs import VisionInput
from spatial_ssrl_jax.qwen_vl.param_tree import Params
from spatial_ssrl_jax.rl.batch import GroupBatch
from spatial_ssrl_jax.rl.bucketing import BatchShape, Buckets, bucket_by_length
from spatial_ssrl_jax.rl.logprobs import logprobs_of, vision_features
from spatial_ssrl_jax.rl.losses import GrpoLoss
from spatial_ssrl_jax.rl.train_step import (
    TrainState,
    apply_gradients,
    gradient_shardings,
    micro_gradients,
    param_shardings,
)


@dataclass(frozen=True)
class UpdatesAhead:
    """Compiles what an update calls.

    Attributes:
      queue: does it.
      settings: the config's `grpo` section.
      loss, optimizer: the stage's.
      layout: where batches are.
      buckets: sizes that programs are compiled for.
    """

    queue: CompileAhead
    settings: GrpoSettings
    loss: GrpoLoss
    optimizer: optax.GradientTransformation
    layout: Layout
    buckets: Buckets

    def claim(self, batch: GroupBatch[Any]) -> None:
        """Call it before a micro-batch's programs: see `CompileAhead.claim`."""
        self.queue.claim(_shape(batch))

    def expect_first(
        self,
        state: TrainState[Array],
        reference: Params | None,
        batch: Batch,
        kl_coef: np.float32 | None,
    ) -> None:
        """Queues the programs of a stage's first updates, before their rollout.

        Args:
          state: of the stage.
          reference: the KL's, or None.
          batch: this process's prompts.
          kl_coef: as in the micro-batches.
        """
        if not self.queue.enabled or self.queue.started:
            return
        settings, prompts = self.settings, batch.prompts
        width, rows = self.buckets.response[-1], settings.micro_batch_prompts
        of_token = np.zeros((1, settings.group_size, width), np.float32)
        of_sample = of_token[:, :, 0]
        sizes = np.column_stack((prompt_sizes(prompts), np.full(len(prompts), width)))
        per_update = len(prompts) // settings.minibatches_per_rollout
        expected = []
        for first in range(0, len(prompts), per_update):
            mine = sizes[first : first + per_update]
            for part in bucket_by_length(mine, rows // jax.process_count(), self.buckets):
                one = GroupBatch(
                    prompts=replace(part, rows=first + part.rows[:1]).pad(prompts),
                    tokens=of_token.astype(np.int32),
                    length=of_sample.astype(np.int32),
                    weight=of_sample,
                    normaliser=np.zeros((), np.float32),
                    advantage=of_sample,
                    sampled_logprobs=of_token,
                    old_logprobs=None,
                    reference_logprobs=None,
                    kl_coef=None if kl_coef is None else np.asarray(kl_coef),
                )
                expected.append(self.layout.abstract_batch(one, rows))
        self._expect(state, reference, expected)

    def expect_next(
        self,
        state: TrainState[Array],
        reference: Params | None,
        batches: Iterable[GroupBatch[Array]],
    ) -> None:
        """Queues those of responses a bucket longer, and shorter, than in these micro-batches."""
        if not self.queue.enabled:
            return
        expected, widths = [], self.buckets.response
        for batch in batches:
            here = widths.index(batch.tokens.shape[2])
            for width in widths[here + 1 : here + 2] + widths[max(0, here - 1) : here]:
                expected.append(_widened(abstract(batch), width))
        self._expect(state, reference, expected)

    def _expect(
        self,
        state: TrainState[Array],
        reference: Params | None,
        batches: Iterable[GroupBatch[ShapeDtypeStruct]],
    ) -> None:
        shapes, of_reference = abstract(state), abstract(offload.to_device(reference))
        for batch in batches:
            self.queue.add(_shape(batch), partial(self._compile, shapes, of_reference, batch))

    def _compile(
        self,
        state: TrainState[ShapeDtypeStruct],
        reference: Params | None,
        batch: GroupBatch[ShapeDtypeStruct],
    ) -> None:
        """The programs in the order in which a step calls them."""
        loss, trained = self.loss, state.trained
        logprobs = partial(
            compile_abstract, logprobs_of, loss.config, loss.compute, self.settings.temperature
        )
        batch = self._with_features(state.params, batch)
        old = first_update = None
        if self.settings.recomputes_old_logprobs:
            logprobs(state.params, batch)
            old = batch.sampled_logprobs
            first_update = batch.normaliser.update(dtype=np.bool_)
        batch = replace(
            batch,
            old_logprobs=old,
            reference_logprobs=None if reference is None else logprobs(reference, batch),
            first_update=first_update,
        )
        args = (loss, trained, state.frozen, batch, gradient_shardings(trained))
        gradients, _ = compile_abstract(micro_gradients, *args)
        args = (self.optimizer, replace(state, frozen={}), gradients, param_shardings(trained))
        compile_abstract(apply_gradients, *args)

    def _with_features(
        self, params: Params, batch: GroupBatch[ShapeDtypeStruct]
    ) -> GroupBatch[ShapeDtypeStruct]:
        """With features of the images, where the updates reuse them and the batch has pixels."""
        prompts, loss, settings = batch.prompts, self.loss, self.settings
        vision = prompts.vision
        if not isinstance(vision, VisionInput) or not settings.reuses_vision:
            return batch
        if not vision.frame.shape[1]:
            return batch
        args = (loss.config, loss.compute, not settings.trains("merger"), params, vision)
        features = jax.tree.map(
            lambda x: x.update(sharding=self.layout.batch_sharding()),
            compile_abstract(vision_features, *args),
        )
        return replace(batch, prompts=replace(prompts, vision=features))


def _shape(batch: GroupBatch[Any]) -> BatchShape:
    return BatchShape(
        tokens=batch.prompts.ids.shape[1],
        windows=batch.prompts.vision.windows,
        response=batch.tokens.shape[2],
    )


def _widened(batch: GroupBatch[ShapeDtypeStruct], width: int) -> GroupBatch[ShapeDtypeStruct]:
    """With responses of another width, and without the log-probabilities that follow."""

    def widened(x: ShapeDtypeStruct) -> ShapeDtypeStruct:
        return x.update(shape=(*x.shape[:2], width))

    return replace(
        batch,
        tokens=widened(batch.tokens),
        sampled_logprobs=widened(batch.sampled_logprobs),
        old_logprobs=None,
        reference_logprobs=None,
        first_update=None,
    )
