"""Model FLOP/s of a step, and model FLOPs utilisation (MFU): their fraction of the devices' peak.

Tokens of prompts, images and responses count, each prompt once a group; padding, recomputation in
the backward pass, and groups that were sampled and dropped do not. Groups without gradient, which
the update leaves out, count as sampled alone.
"""

from collections.abc import Sequence

import jax
import numpy as np

from spatial_ssrl_jax.config.schema import GrpoSettings, StageSettings
from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.parallel.collectives import all_sum
from spatial_ssrl_jax.perf.device_specs import device_spec
from spatial_ssrl_jax.perf.flops import batch_flops
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig


def useful_flops(
    config: QwenVLConfig,
    stage: StageSettings,
    prompts: Sequence[Prompt],
    length_BG: np.ndarray,
    updated_B: np.ndarray | None = None,
) -> float:
    """FLOPs that a step of a stage needs, over all processes.

    Args:
      config: the model's shape.
      stage: the stage's settings.
      prompts: this process's B prompts.
      length_BG: [B, G] int32 tokens of each response.
      updated_B: bool, the groups that the update computes; None for all.
    """
    sampled = sum(batch_flops(config, prompts, length_BG))
    if updated_B is not None:
        prompts = [prompt for prompt, updated in zip(prompts, updated_B, strict=True) if updated]
        length_BG = length_BG[updated_B]
    vision, text = batch_flops(config, prompts, length_BG)
    vision_passes, text_passes = update_passes(stage)
    sampling = sampled if isinstance(stage, GrpoSettings) else 0.0
    return all_sum(sampling + vision_passes * vision + text_passes * text)


def update_passes(stage: StageSettings) -> tuple[float, float]:
    """Forward passes' worth of a step's updates in the vision tower and in the language model.

    Reference log-probabilities are one, and old ones are those of the updates after the first;
    images that are encoded once for all of these count once, and the merger with them. An
    update is one for the forward pass, one for the gradients of activations, and one for those of
    weights; a layer needs neither gradient where nothing trains at or before it. Adapters' own
    matmuls are left out.
    """
    forward = 0.0
    if isinstance(stage, GrpoSettings):
        later = 1 - 1 / stage.minibatches_per_rollout  # of the step's prompts
        forward = (stage.kl_coef > 0) + later * stage.recomputes_old_logprobs
    reuses = isinstance(stage, GrpoSettings) and stage.reuses_vision
    if stage.lora.rank:
        vision = 2 if stage.trains("vision") else 1
        text = 2
    else:
        vision = 3 if stage.trains("vision") else 1
        text = 3 if stage.trains("language") else 2
    return vision if reuses else forward + vision, forward + text


def mfu_metrics(flops: float, seconds: float) -> dict[str, float]:
    """FLOP/s of all devices, and MFU where the devices' peak is known."""
    rate, spec = flops / seconds, device_spec()
    found = {"perf/flops_per_second": rate}
    if spec is None:
        return found
    return found | {"perf/mfu": rate / (spec.flops * jax.device_count())}
