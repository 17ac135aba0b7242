"""What each stage of a run starts from, anew or from a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import optax

from spatial_ssrl_jax.checkpoint.checksums import find_damage
from spatial_ssrl_jax.checkpoint.manager import Checkpoints
from spatial_ssrl_jax.checkpoint.models import ModelFolder, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config, GrpoSettings, SftSettings
from spatial_ssrl_jax.parallel import offload
from spatial_ssrl_jax.parallel.collectives import all_sum, is_primary
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.layers import cast
from spatial_ssrl_jax.qwen_vl.lora import drop_adapters
from spatial_ssrl_jax.qwen_vl.tree import Params, merge_params, select_params
from spatial_ssrl_jax.rl.placement import abstract_stage_state
from spatial_ssrl_jax.rl.train_step import TrainState, initial_train_state
from spatial_ssrl_jax.rl.trainable import Trainable


@dataclass(frozen=True)
class StageInitializer:
    """Reads and draws weights for a run's stages.

    Attributes:
      config: the run.
      model: the model it names.
      layout: where weights are.
      checkpoints: the run's.
      say: tells the user what is read.
    """

    config: Config
    model: ModelFolder
    layout: Layout
    checkpoints: Checkpoints
    say: Callable[[str], None]

    def first(self) -> SftSettings | GrpoSettings:
        """The section of the stage that the run begins with."""
        return self.config.sft if self.config.sft.steps else self.config.grpo

    def params(self, stage: SftSettings | GrpoSettings) -> Params:
        """The model that a stage starts from: drawn, read, or the cold start's result."""
        dtype = self._dtype(stage)
        model = self.base(stage)
        if model is None:
            return cast(self.model.draw(self.layout, self.config.seed), dtype)
        if stage is not self.first():
            _check_whole(model)
        self.say(f"reading {model.name}")
        return model.load(self.layout, dtype)

    def base(self, stage: SftSettings | GrpoSettings) -> ModelFolder | None:
        """Where the weights that a stage starts from are; None when they are drawn."""
        config = self.config
        if stage is not self.first():
            self.checkpoints.wait()  # the cold start's last one may still be on its way
            return open_model(self.checkpoints.folder / str(config.sft.steps))
        if stage is config.grpo and config.grpo.init_from:
            return open_model(config.grpo.init_from)
        return None if config.model.from_scratch else self.model

    def state(
        self,
        stage: SftSettings | GrpoSettings,
        optimizer: optax.GradientTransformation,
        params: Params,
    ) -> TrainState:
        """A stage's state before its first step; it takes the arrays of `params` over."""
        if stage.lora.rank:
            seed = 2 * self.config.seed + (stage is self.config.grpo)
            adapters = self.model.draw_adapters(self.layout, stage.lora, seed)
            params = merge_params(params, adapters)
        split = Trainable.of(stage).split(params, self.config.model.dtype)
        return self._rested(self._told(initial_train_state(optimizer, *split)))

    def restored(
        self,
        stage: SftSettings | GrpoSettings,
        optimizer: optax.GradientTransformation,
        step: int,
    ) -> TrainState:
        """A stage's state as the checkpoint of the run's step `step` has it."""
        like = abstract_stage_state(self.config, self.model.config, self.layout, stage, optimizer)
        state, _ = self.checkpoints.restore(step, like)
        return self._rested(self._told(state))

    def reference(
        self, stage: SftSettings | GrpoSettings, state: TrainState, fresh: bool
    ) -> Params:
        """The weights that a stage started from, for the KL; shares what is frozen.

        Args:
          stage: its section.
          state: where it stands.
          fresh: that is before its first step.
        """
        if stage.lora.rank:
            return drop_adapters(state.frozen)
        trained = state.trained if fresh else select_params(self.params(stage), Trainable.of(stage))
        copy = _copy(trained, self.config.model.dtype)
        return merge_params(
            offload.to_host(copy) if self.config.optim.offload else copy, state.frozen
        )

    def _rested(self, state: TrainState) -> TrainState:
        """The state, its moments in host memory where `optim.offload` says so."""
        if not self.config.optim.offload:
            return state
        return replace(state, opt_state=offload.to_host(state.opt_state))

    def _dtype(self, stage: SftSettings | GrpoSettings) -> str:
        """Master weights are float32; a base that only adapters are trained over needs no more
        than the compute dtype."""
        return self.config.model.dtype if stage.lora.rank else "float32"

    def _told(self, state: TrainState) -> TrainState:
        trained, frozen = (
            sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.trained, state.frozen)
        )
        self.say(f"training {trained:,} of {trained + frozen:,} weights")
        return state


def _check_whole(step: ModelFolder) -> None:
    """Refuses a kept checkpoint that is not as it was written; every process calls it.

    Raises:
      UserError: says what is wrong with it.
    """
    wrong = find_damage(step.weights) if is_primary() else None
    if all_sum(wrong is not None):
        raise UserError(
            f"the cold start's checkpoint {step.name} is damaged ({wrong or 'see process 0'}): "
            "copy it back from where it is whole, or train anew in another --workdir."
        )


def _copy(params: Params, dtype: str) -> Params:
    """Arrays of their own: the update donates the originals."""
    return jax.jit(lambda p: cast(jax.tree.map(lambda x: x + 0, p), dtype))(params)


def check_initial_weights(config: Config, model: ModelFolder) -> None:
    """Refuses weights that a run cannot start from, by their files' headers alone.

    Raises:
      UserError: nothing usable is there, or `grpo.init_from` is a model of another shape.
    """
    path = config.grpo.init_from
    first = open_model(path) if path else model
    if first.config != model.config:
        raise UserError(
            f"grpo.init_from={path} is another model than model.path={config.model.path}: "
            "give one with the same config.json."
        )
    if path or not config.model.from_scratch:
        first.check_weights()
