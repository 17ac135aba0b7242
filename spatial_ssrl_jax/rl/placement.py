"""How a stage's programs compute and how its arrays are sharded: training and planning share it."""

import math

import jax
import numpy as np
import optax

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config, StageSettings
from spatial_ssrl_jax.parallel.sharding import Layout, shard_bytes
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.kernels import choose_decode_kernel, choose_kernel
from spatial_ssrl_jax.rl.optimizer import make_optimizer
from spatial_ssrl_jax.rl.train_step import TrainState, abstract_train_state
from spatial_ssrl_jax.rl.trainable import Trainable
from spatial_ssrl_jax.rollout.cache import kv_token_bytes

_FILLED = 0.92  # of a device's memory, by what is counted here; programs need some beside


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


def cache_bytes(config: Config, model: QwenVLConfig, rollout_layout: Layout, tokens: int) -> int:
    """Bytes of each device for as many tokens of sampling's caches over all rows.

    Args:
      config: the run.
      model: the model's shape.
      rollout_layout: for sampling.
      tokens: of all prompts and responses, padding included.
    """
    tensor = config.rollout.tensor
    heads = 1 if model.text.num_key_value_heads % tensor else tensor
    shards = rollout_layout.batch_shards * heads
    return tokens * kv_token_bytes(model.text, config.model.dtype) // shards


def rollout_prompts(
    config: Config,
    model: QwenVLConfig,
    layout: Layout,
    rollout_layout: Layout,
    memory: int | None,
) -> int:
    """Prompts of a GRPO step that are sampled at a time, which `rollout.batch_prompts` may say.

    Otherwise as many as fit, with every prompt of the largest bucket and every response of
    `rollout.max_new_tokens`, beside what training keeps on the device and the copy of the weights.

    Args:
      config: the run.
      model: the model's shape.
      layout, rollout_layout: for training, and for sampling.
      memory: bytes of a device; None where not known, and all prompts are taken.
    """
    rollout, grpo = config.rollout, config.grpo
    if rollout.batch_prompts:
        return rollout.batch_prompts
    shards = math.lcm(layout.batch_shards, rollout_layout.batch_shards)
    sizes = [n for n in range(shards, grpo.prompts + 1, shards) if grpo.prompts % n == 0]
    if memory is None or not sizes:
        return grpo.prompts
    prompt = max(config.data.prompt_buckets) + grpo.group_size * rollout.max_new_tokens
    held = _held_while_sampling(config, model, layout, rollout_layout)
    fitting = [
        n
        for n in sizes
        if held + cache_bytes(config, model, rollout_layout, n * prompt) <= _FILLED * memory
    ]
    return max(fitting, default=sizes[0])


def _held_while_sampling(
    config: Config, model: QwenVLConfig, layout: Layout, rollout_layout: Layout
) -> int:
    """Bytes of each device without caches: weights, moments, the reference and the copy."""
    size, grpo = np.dtype(config.model.dtype).itemsize, config.grpo
    optimizer = make_optimizer(config.optim, grpo, grpo.steps * grpo.minibatches_per_rollout)
    state = abstract_stage_state(config, model, layout, grpo, optimizer)
    held = shard_bytes(state.trained) + shard_bytes(state.frozen)
    held += shard_bytes(rollout_layout.abstract_params(model, part="text/"), size)
    if not config.optim.offload:
        held += shard_bytes(state.opt_state)
        held += shard_bytes(state.trained, size) if grpo.copies_reference else 0
    return held


def prefill_prompts(batch_prompts: int, limit: int, shards: int) -> int:
    """The most prompts up to a limit, and one a shard at least, that divide a rollout batch."""
    sizes = [n for n in range(shards, max(limit, shards) + 1, shards) if batch_prompts % n == 0]
    return max(sizes, default=batch_prompts)


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
        trained["grpo.micro_batch_rows"] = config.grpo.micro_batch_rows
        size = config.rollout.batch_prompts
        sampled |= (
            {"rollout.batch_prompts": size} if size else {"grpo.prompts": config.grpo.prompts}
        )
    processes = jax.process_count()
    if config.sft.steps and config.sft.prompts % processes:
        raise UserError(
            f"sft.prompts={config.sft.prompts} must be a multiple of the {processes} processes."
        )
    update = config.grpo.prompts // config.grpo.minibatches_per_rollout
    if config.grpo.steps and update % processes:
        raise UserError(
            f"grpo.prompts/minibatches_per_rollout={update} must be a multiple of the {processes} "
            "processes."
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
