"""The initial state of each stage: new weights, a model, or a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import optax

from spatial_ssrl_jax.checkpoint.checksums import find_damage
from spatial_ssrl_jax.checkpoint.manager import Checkpoints
from spatial_ssrl_jax.checkpoint.models import ModelFolder, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config, StageSettings
from spatial_ssrl_jax.parallel import offload
from spatial_ssrl_jax.parallel.collectives import all_sum, is_primary
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.layers import cast
from spatial_ssrl_jax.qwen_vl.lora import drop_adapters
from spatial_ssrl_jax.qwen_vl.param_tree import Params, merge_params, select_params
from spatial_ssrl_jax.rl.placement import abstract_stage_state
from spatial_ssrl_jax.rl.stages import GrpoStage, Stage
from spatial_ssrl_jax.rl.train_step import TrainState, initial_train_state
from spatial_ssrl_jax.rl.trainable import Trainable


@dataclass(frozen=True)
class StageInitializer:
    """Reads or initialises the weights and states of a run's stages.

    Attributes:
      config: the run.
      model: the model of `model.path`.
      layout: the sharding of weights.
      checkpoints: the run's checkpoints.
      say: called with messages for the user.
    """

    config: Config
    model: ModelFolder
    layout: Layout
    checkpoints: Checkpoints
    say: Callable[[str], None]

    def params(self, stage: Stage) -> Params:
        """The weights that a stage starts from: random, a model's, or the result of SFT."""
        dtype = self._dtype(stage.settings)
        model = self.base(stage)
        if model is None:
            return cast(self.model.init(self.layout, self.config.seed), dtype)
        if stage.start_step:
            _check_undamaged(model)
        self.say(f"reading {model.name}")
        return model.load(self.layout, dtype)

    def base(self, stage: Stage) -> ModelFolder | None:
        """The model whose weights a stage starts from; None when they are random."""
        if stage.start_step:
            self.checkpoints.wait()  # the last save of the stage before may not be complete
            return open_model(self.checkpoints.folder / str(stage.start_step))
        if isinstance(stage, GrpoStage) and stage.settings.init_from:
            return open_model(stage.settings.init_from)
        return None if self.config.model.from_scratch else self.model

    def state(
        self,
        stage: Stage,
        optimizer: optax.GradientTransformation,
        params: Params,
    ) -> TrainState:
        """A stage's state before its first step; it takes over the arrays of `params`."""
        settings = stage.settings
        if settings.lora.rank:
            adapters = self.model.init_adapters(self.layout, settings.lora, stage.seed)
            params = merge_params(params, adapters)
        split = Trainable.of(settings).split(params, self.config.model.dtype)
        return self._offloaded(self._reported(initial_train_state(optimizer, *split)))

    def restored(
        self,
        stage: Stage,
        optimizer: optax.GradientTransformation,
        step: int,
    ) -> TrainState:
        """A stage's state from the checkpoint of the run's step `step`."""
        like = abstract_stage_state(
            self.config, self.model.config, self.layout, stage.settings, optimizer
        )
        state, _ = self.checkpoints.restore(step, like)
        return self._offloaded(self._reported(state))

    def reference(self, stage: Stage, state: TrainState, fresh: bool) -> Params:
        """The weights that a stage starts from, as the KL's reference; frozen ones are shared.

        Args:
          stage: GRPO.
          state: the stage's state.
          fresh: whether that is the state before the first step.
        """
        if stage.settings.lora.rank:
            return drop_adapters(state.frozen)
        trained = state.trained
        if not fresh:
            trained = select_params(self.params(stage), Trainable.of(stage.settings))
        copy = _copy(trained, self.config.model.dtype)
        return merge_params(
            offload.to_host(copy) if self.config.optim.offload else copy, state.frozen
        )

    def _offloaded(self, state: TrainState) -> TrainState:
        """The state, with its moments in host memory if `optim.offload` is set."""
        if not self.config.optim.offload:
            return state
        return replace(state, opt_state=offload.to_host(state.opt_state))

    def _dtype(self, settings: StageSettings) -> str:
        """Master weights are float32; the frozen base of adapters has the compute dtype."""
        return self.config.model.dtype if settings.lora.rank else "float32"

    def _reported(self, state: TrainState) -> TrainState:
        """The same state; reports how many weights train."""
        trained, frozen = (
            sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.trained, state.frozen)
        )
        self.say(f"training {trained:,} of {trained + frozen:,} weights")
        return state


def _check_undamaged(step: ModelFolder) -> None:
    """Checks a checkpoint's checksums; every process calls it.

    Raises:
      UserError: it is damaged.
    """
    damage = find_damage(step.weights) if is_primary() else None
    if all_sum(damage is not None):
        raise UserError(
            f"the SFT checkpoint {step.name} is damaged ({damage or 'see process 0'}): "
            "restore it from a copy, or train again in another --workdir."
        )


def _copy(params: Params, dtype: str) -> Params:
    """A copy in `dtype`: the update donates the originals."""
    return jax.jit(lambda p: cast(jax.tree.map(lambda x: x + 0, p), dtype))(params)


def check_initial_weights(config: Config, model: ModelFolder) -> None:
    """Checks the weights that a run starts from, by their files' headers alone.

    Raises:
      UserError: they are missing or damaged, or `grpo.init_from` is a model of another shape.
    """
    path = config.grpo.init_from
    first = open_model(path) if path else model
    if first.config != model.config:
        raise UserError(
            f"grpo.init_from={path} is another model than model.path={config.model.path}: "
            "give one whose config.json and preprocessor_config.json say the same."
        )
    if path or not config.model.from_scratch:
        first.check_weights()
