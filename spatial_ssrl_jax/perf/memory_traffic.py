"""Minimum memory traffic of a step in bytes, from shapes alone.

Weights are counted once a pass and a decode step, KV caches once a read. Activations, logits and
gathered embedding rows are left out: how often they leave a chip's caches is up to the compiler.
"""

import jax
import numpy as np

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


def decode_bytes(config: QwenVLConfig, dtype: str, prompt: int, length_BG: np.ndarray) -> float:
    """Bytes of all decode steps: weights, prompts' caches once a group, each sample's own cache.

    Step i reads i + 1 tokens of every unfinished sample, and the prompts that have one.

    Args:
      config: the model's shape.
      dtype: of weights and caches.
      prompt: tokens of each prompt.
      length_BG: tokens of the responses that are sampled at a time.
    """
    length = length_BG.astype(np.int64)
    cached = prompt * length.max(axis=1).sum() + (length * (length + 1) // 2).sum()
    weights = int(length.max()) * weight_bytes(config, dtype, vision=False)
    return weights + float(cached) * kv_token_bytes(config.text, dtype)


def rollout_bytes(config: QwenVLConfig, dtype: str, prompt: int, length_BG: np.ndarray) -> float:
    """Bytes of prefill, which reads all weights and writes the prompts' caches, and of decoding."""
    written = len(length_BG) * prompt * kv_token_bytes(config.text, dtype)
    return weight_bytes(config, dtype) + written + decode_bytes(config, dtype, prompt, length_BG)


def update_bytes(config: QwenVLConfig, dtype: str) -> float:
    """Bytes of an update: weights forward and backward, gradients written and read, and AdamW.

    AdamW reads and writes master weights and both moments, all float32. An update of one
    micro-batch is counted: each further one reads the weights again and adds to the gradients.
    """
    optimizer = (2 + 6) * _MASTER * _count(abstract_params(config))
    return 2 * weight_bytes(config, dtype) + optimizer


def _count(params: Params | tuple[Params, ...]) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
