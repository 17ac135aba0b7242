"""How a stage's programs compute and how its arrays are sharded: training and planning share it."""

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
) -> TrainState[jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of what a stage carries from step to step.

    Args:
      config: the run.
      model: the model's shape.
      layout: for training.
      stage: its section.
      optimizer: as the stage makes it.
    """
    whole = layout.abstract_params(model, stage.lora)
    split = Trainable.of(stage).split(whole, config.model.dtype)
    return abstract_train_state(optimizer, *split)


def compute_settings(config: Config, layout: Layout) -> Compute:
    """How the run's programs compute, and the sharding of training's activations.

    Raises:
      UserError: the devices do not have what `model.attention` or `rollout.attention` asks for.
    """
    model = config.model
    return Compute(
        dtype=model.dtype,
        attention_chunk=model.attention_chunk,
        vocab_block=model.vocab_block,
        remat=model.remat,
        attention=choose_kernel(model.attention, model.dtype, layout.mesh),
        decode_attention=choose_decode_kernel(config.rollout.attention, model.dtype, layout.mesh),
        batch_sharding=layout.batch_sharding(),
    )


def check_sharding(config: Config, model: QwenVLConfig, layout: Layout) -> Layout:
    """Refuses weights and batches that cannot be sharded over the devices.

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
    # A rollout batch is prefilled in the training layout, and decoded in the other one.
    over = "the devices over rollout.tensor"
    _check_multiples(sampled, rollout.batch_shards, over)
    _check_multiples(sampled | trained, layout.batch_shards, "mesh.data x mesh.fsdp")
    return rollout


def _check_multiples(sizes: dict[str, int], shards: int, axes: str) -> None:
    for name, value in sizes.items():
        if value % shards:
            raise UserError(
                f"{name}={value} must be a multiple of the {shards} shards of a batch over {axes}."
            )
