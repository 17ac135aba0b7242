"""Bytes that a step cannot do without moving from and to memory, from shapes alone.

Weights are counted once a pass and a decode step, caches once a reading. Activations, logits and
gathered embedding rows are left out: how often they leave a chip's caches is the compiler's doing.
"""

import jax
import numpy as np

from spatial_ssrl_jax.perf.flops import GroupShape
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.model import abstract_params
from spatial_ssrl_jax.rollout.cache import kv_token_bytes

_MASTER = 4  # bytes of a float32 weight, gradient or moment


def weight_bytes(config: QwenVLConfig, dtype: str, vision: bool = True) -> float:
    """What one pass reads: all weights but an untied embedding, of which few rows are read."""
    params = abstract_params(config)
    text = dict(params["text"])
    if not config.tie_word_embeddings:
        del text["embed"]
    read = (text, params["vision"]) if vision else text
    return float(_count(read) * np.dtype(dtype).itemsize)


def decode_bytes(config: QwenVLConfig, dtype: str, shape: GroupShape, prompts: int) -> float:
    """All decode steps: weights, prompts' caches once a group, samples' own.

    Step i reads i + 1 tokens of every sample.

    Args:
      config: the model's shape.
      dtype: of weights and caches.
      shape: of each prompt and its group.
      prompts: groups that are sampled at a time.
    """
    steps = shape.response
    own = shape.group * (1 + steps) / 2  # on average over the steps
    cached = prompts * (shape.prompt + own)
    return steps * (
        weight_bytes(config, dtype, vision=False) + cached * kv_token_bytes(config.text, dtype)
    )


def rollout_bytes(config: QwenVLConfig, dtype: str, shape: GroupShape, prompts: int) -> float:
    """Prefill, which reads all weights and writes the prompts' caches, and every decode step."""
    written = prompts * shape.prompt * kv_token_bytes(config.text, dtype)
    decoded = decode_bytes(config, dtype, shape, prompts)
    return weight_bytes(config, dtype) + written + decoded


def update_bytes(config: QwenVLConfig, dtype: str) -> float:
    """Weights once forward and once backward; gradients written and read; AdamW over all weights.

    AdamW reads and writes master weights and both moments, all float32. It is counted as for one
    micro-batch: more of them read the weights again and add gradients up.
    """
    optimizer = (2 + 6) * _MASTER * _count(abstract_params(config))
    return 2 * weight_bytes(config, dtype) + optimizer


def _count(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
