"""TODO: rl.placement."""

import jax
import optax

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config, StageSettings
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.kernels import choose_decode_kernel, choose_kernel
from spatial_ssrl_jax.rl.train_step import TrainState, abstract_train_state
from spatial_ssrl_jax.rl.trainable import Trainable


def abstract_stage_state(
    config: Config,
    model: QwenVLConfig,
    layout: Layout,
    stage: StageSettings,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """Shapes and places of what a stage carries from step to step.

    Args:
      config: the run.
      model: the model's shape.
      layout: where weights are.
      stage: its section.
      optimizer: as the stage makes it.
    """
    whole = layout.abstract_params(model, stage.lora)
    split = Trainable.of(stage).split(whole, config.model.dtype)
    return abstract_train_state(optimizer, *split)


def compute_settings(config: Config, layout: Layout) -> Compute:
    """How the run's programs compute, and where the rows of training's activations are.

    Raises:
      UserError: the devices do not have what `model.attention` or `rollout.attention` asks for.
    """
    model, there = config.model, (config.model.dtype, layout.mesh)
    kernel = choose_kernel(model.attention, *there)
    step_kernel = choose_decode_kernel(config.rollout.attention, *there)
    chunks = (model.attention_chunk, model.vocab_block)
    return Compute(model.dtype, *chunks, model.remat, kernel, step_kernel, layout.batch_sharding())


def check_sharding(config: Config, model: QwenVLConfig, layout: Layout) -> Layout:
    """Refuses weights and batches that cannot be cut over the devices.

    Args:
      config: the run.
      model: the model's shape.
      layout: for training.

    Returns:
      The layout for sampling.

    Raises:
      UserError: names the setting, and the axis of a weight or what it must be a multiple of.
    """
    layout.param_shardings(model)
    rollout = layout.rollout(config.rollout.tensor)
    rollout.param_shardings(model, part="text/")
    sampled, trained = {"eval.batch_prompts": config.eval.batch_prompts}, {}
    if config.sft.steps:
        trained["sft.micro_batch_rows"] = config.sft.micro_batch_rows
    if config.grpo.steps:
        trained["grpo.micro_batch_prompts"] = config.grpo.micro_batch_prompts
        sampled["rollout.batch_prompts"] = config.rollout.batch_prompts
    processes = jax.process_count()
    if config.sft.steps and config.sft.prompts % processes:
        raise UserError(
            f"sft.prompts={config.sft.prompts} must be a multiple of the {processes} processes."
        )
    # What is sampled is prefilled where training is, and decoded in the other layout.
    over = "the devices over rollout.tensor"
    _check_parts(sampled, rollout.batch_shards, over)
    _check_parts(sampled | trained, layout.batch_shards, "mesh.data x mesh.fsdp")
    return rollout


def _check_parts(sizes: dict[str, int], parts: int, by: str) -> None:
    for name, value in sizes.items():
        if value % parts:
            raise UserError(
                f"{name}={value} must be a multiple of the {parts} parts that {by} cuts a batch "
                "into."
            )
