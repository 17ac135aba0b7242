"""The stages of a run, SFT and GRPO, as one type: what each trains with, and when."""

from dataclasses import dataclass

import optax

from spatial_ssrl_jax.config.schema import Config, GrpoSettings, SftSettings, StageSettings
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.rl.losses import GrpoLoss, SftLoss
from spatial_ssrl_jax.rl.optimizer import learning_rate, make_optimizer


@dataclass(frozen=True)
class Stage:
    """A stage of a run; one of its subclasses.

    Attributes:
      name: `sft` or `grpo`: its section of the config, and its name in metrics.
      settings: that section.
      start_step: the run's steps before it.
      seed: of its data and of its adapters.
    """

    name: str
    settings: StageSettings
    start_step: int
    seed: int

    @property
    def last_step(self) -> int:
        """The run's last step of it."""
        return self.start_step + self.settings.steps

    @property
    def updates(self) -> int:
        """Optimizer steps."""
        return self.settings.steps

    @property
    def update_prompts(self) -> int:
        """Prompts of an optimizer step, of which every process has an equal number."""
        return self.settings.prompts

    def steps_left(self, step: int) -> int:
        """Steps of it after the run's step `step`."""
        return min(max(self.last_step - step, 0), self.settings.steps)

    def optimizer(self, config: Config) -> optax.GradientTransformation:
        return make_optimizer(config.optim, self.settings, self.updates)

    def learning_rate(self) -> optax.Schedule:
        """The learning rate at each optimizer step."""
        return learning_rate(self.settings, self.updates)


@dataclass(frozen=True)
class SftStage(Stage):
    """Supervised fine-tuning."""

    settings: SftSettings

    def loss(self, model: QwenVLConfig, compute: Compute) -> SftLoss:
        return SftLoss(model, compute)


@dataclass(frozen=True)
class GrpoStage(Stage):
    """Group-relative policy optimisation."""

    settings: GrpoSettings

    @property
    def updates(self) -> int:
        return self.settings.steps * self.settings.minibatches_per_rollout

    @property
    def update_prompts(self) -> int:
        return self.settings.prompts // self.settings.minibatches_per_rollout

    def loss(self, model: QwenVLConfig, compute: Compute) -> GrpoLoss:
        return GrpoLoss(model, compute, self.settings)


def stages(config: Config) -> tuple[SftStage | GrpoStage, ...]:
    """The stages that have steps, in the order in which a run trains them."""
    sft = SftStage("sft", config.sft, 0, 2 * config.seed)
    grpo = GrpoStage("grpo", config.grpo, config.sft.steps, 2 * config.seed + 1)
    return tuple(stage for stage in (sft, grpo) if stage.settings.steps)
