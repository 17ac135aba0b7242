"""The programs of GRPO's updates, compiled in a thread while the first rollout runs."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax import Array, ShapeDtypeStruct

from spatial_ssrl_jax.config.schema import GrpoSettings
from spatial_ssrl_jax.data.packing import RowShape
from spatial_ssrl_jax.parallel import offload
from spatial_ssrl_jax.parallel.compile_ahead import CompileAhead, abstract, compile_abstract
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.inputs import VisionInput
from spatial_ssrl_jax.qwen_vl.param_tree import Params
from spatial_ssrl_jax.rl.batch import GroupBatch
from spatial_ssrl_jax.rl.logprobs import logprobs_of, vision_features
from spatial_ssrl_jax.rl.losses import GrpoLoss
from spatial_ssrl_jax.rl.row_shapes import empty_group_batch
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
      shapes: of rows.
    """

    queue: CompileAhead
    settings: GrpoSettings
    loss: GrpoLoss
    optimizer: optax.GradientTransformation
    layout: Layout
    shapes: tuple[RowShape, ...]

    def claim(self, batch: GroupBatch[Any]) -> None:
        """Call it before a micro-batch's programs: see `CompileAhead.claim`."""
        self.queue.claim(_key(batch))

    def expect(
        self, state: TrainState[Array], reference: Params | None, kl_coef: np.float32 | None
    ) -> None:
        """Queues the programs of all shapes, once; call it before a rollout.

        Args:
          state: of the stage.
          reference: the KL's, or None.
          kl_coef: as in the micro-batches.
        """
        if not self.queue.enabled or self.queue.started:
            return
        shapes, of_reference = abstract(state), abstract(offload.to_device(reference))
        for shape in self.shapes:
            one = empty_group_batch(shape, self.loss.config.vision)
            one = replace(one, kl_coef=None if kl_coef is None else np.asarray(kl_coef))
            batch = self.layout.abstract_batch(one, self.settings.micro_batch_rows)
            self.queue.add(_key(batch), partial(self._compile, shapes, of_reference, batch))

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
            logprobs(state.params, batch.rows)
            old = batch.sampled_logprobs
            first_update = batch.normaliser.update(dtype=np.bool_)
        batch = replace(
            batch,
            old_logprobs=old,
            reference_logprobs=None if reference is None else logprobs(reference, batch.rows),
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
        loss, settings, vision = self.loss, self.settings, batch.rows.vision
        if not isinstance(vision, VisionInput) or not settings.reuses_vision:
            return batch
        if not vision.frame.shape[1]:
            return batch
        args = (loss.config, loss.compute, not settings.trains("merger"), params, vision)
        features = jax.tree.map(
            lambda x: x.update(sharding=self.layout.batch_sharding()),
            compile_abstract(vision_features, *args),
        )
        return replace(batch, rows=replace(batch.rows, vision=features))


def _key(batch: GroupBatch[Any]) -> tuple[Any, ...]:
    """What tells micro-batches of different shapes apart."""
    rows = batch.rows
    return (*rows.ids.shape, rows.vision.length, rows.place.shape[1], rows.limits)
