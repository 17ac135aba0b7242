"""What a step needed to compute, over what its devices could have: FLOPs a second, and MFU.

Needed are the tokens of prompts, images and responses, each prompt once a group: padding, what is
computed again in the backward pass, and groups that were sampled and thrown away are left out.
"""

import jax
import numpy as np

from spatial_ssrl_jax.config.schema import GrpoSettings, StageSettings
from spatial_ssrl_jax.parallel.collectives import all_sum
from spatial_ssrl_jax.perf.device_specs import device_spec
from spatial_ssrl_jax.perf.flops import batch_flops
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch


def useful_flops(
    config: QwenVLConfig,
    stage: StageSettings,
    prompts: PromptBatch,
    length_BG: np.ndarray,
) -> float:
    """FLOPs that a step of a stage needs, over all processes.

    Args:
      config: the model's shape.
      stage: its section.
      prompts: this process's prompts, NumPy arrays.
      length_BG: [B, G] tokens of each response.
    """
    vision, text = batch_flops(config, prompts, length_BG)
    vision_passes, text_passes = forward_passes(stage)
    return all_sum(vision_passes * vision + text_passes * text)


def forward_passes(stage: StageSettings) -> tuple[int, int]:
    """How many forward passes' worth a step takes in the vision tower and in the language model.

    Sampling, the reference's and the old log-probabilities are one each. In an update the forward
    pass is one, the gradient of what flows one more, and that of the weights one more; neither is
    needed where nothing trains at or before a layer, and adapters' own products are left out.
    """
    forward = 0
    if isinstance(stage, GrpoSettings):
        forward = 1 + (stage.kl_coef > 0) + stage.recomputes_old_logprobs
    if stage.lora.rank:
        vision = 2 if stage.trains("vision") else 1
        text = 2
    else:
        vision = 3 if stage.trains("vision") else 1
        text = 3 if stage.trains("language") else 2
    return forward + vision, forward + text


def mfu_metrics(flops: float, seconds: float) -> dict[str, float]:
    """FLOPs a second of all devices, and the share of their peak (MFU) where that is known."""
    rate, peak = flops / seconds, device_spec()
    found = {"perf/flops_per_second": rate}
    if peak is None:
        return found
    return found | {"perf/mfu": rate / (peak.flops * jax.device_count())}
