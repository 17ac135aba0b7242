"""Minimum memory traffic of a step in bytes, from shapes alone.

Weights are counted once a pass and a decode step, KV caches once a read. Activations, logits and
gathered embedding rows are left out: how often they leave a chip's caches is up to the compiler.
"""

import jax
import numpy as np

from spatial_ssrl_jax.perf.flops import GroupShape
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.model import Params, abstract_params
from spatial_ssrl_jax.rollout.cache import kv_token_bytes

_MASTER = 4  # bytes of a float32 weight, gradient or moment


def weight_bytes(config: QwenVLConfig, dtype: str, vision: bool = True) -> float:
    """Bytes that a pass reads: all weights but an untied embedding, of which it reads few rows."""
    params = abstract_params(config)
    text = dict(params["text"])
    if not config.tie_word_embeddings:
        del text["embed"]
    read = (text, params["vision"]) if vision else text
    return float(_count(read) * np.dtype(dtype).itemsize)


def decode_bytes(config: QwenVLConfig, dtype: str, shape: GroupShape, prompts: int) -> float:
    """Bytes of all decode steps: weights, prompts' caches once a group, each sample's own cache.

    Step i reads i + 1 tokens of every sample.

    Args:
      config: the model's shape.
      dtype: of weights and caches.
      shape: each prompt and its group.
      prompts: groups that are sampled at a time.
    """
    steps = shape.response
    own = shape.group * (1 + steps) / 2  # on average over the steps
    cached = prompts * (shape.prompt + own)
    return steps * (
        weight_bytes(config, dtype, vision=False) + cached * kv_token_bytes(config.text, dtype)
    )


def rollout_bytes(config: QwenVLConfig, dtype: str, shape: GroupShape, prompts: int) -> float:
    """Bytes of prefill, which reads all weights and writes the prompts' caches, and of decoding."""
    written = prompts * shape.prompt * kv_token_bytes(config.text, dtype)
    decoded = decode_bytes(config, dtype, shape, prompts)
    return weight_bytes(config, dtype) + written + decoded


def update_bytes(config: QwenVLConfig, dtype: str) -> float:
    """Bytes of an update: weights forward and backward, gradients written and read, and AdamW.

    AdamW reads and writes master weights and both moments, all float32. An update of one
    micro-batch is counted: each further one reads the weights again and adds to the gradients.
    """
    optimizer = (2 + 6) * _MASTER * _count(abstract_params(config))
    return 2 * weight_bytes(config, dtype) + optimizer


def _count(params: Params | tuple[Params, ...]) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
