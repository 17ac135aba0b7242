"""Log-probabilities of the response tokens of packed rows, and features of their images."""

from functools import partial

import jax
from jax import Array

from spatial_ssrl_jax.qwen_vl import model as qwen
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import PackedRows, VisionFeatures, VisionInput
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.rl.head import head_logprobs


def packed_logprobs(
    config: QwenVLConfig,
    compute: Compute,
    params: Params,
    rows: PackedRows[Array],
    temperature: float,
) -> tuple[Array, Array]:
    """Log-softmax of logits/temperature at each response token of packed rows, and the entropy.

    Args:
      config: the model's shape.
      compute: dtype, chunks and rematerialisation.
      params: the model.
      rows: B rows, each prompt once with all its responses.
      temperature: divides the logits.

    Returns:
      Two [B, R] float32 arrays: log-probabilities (differentiable) and entropies in nats (not
      differentiable). Values of padding mean nothing.
    """
    model = qwen.bind(config, params)
    hidden = qwen.packed_hidden(config, model, rows, compute)
    head = model.text.head_weight(compute.dtype)
    return head_logprobs(compute, head, hidden, rows.label, temperature)


@partial(jax.jit, static_argnums=(0, 1, 2))
def logprobs_of(
    config: QwenVLConfig,
    compute: Compute,
    temperature: float,
    params: Params,
    rows: PackedRows[Array],
) -> Array:
    """[B, R] float32 log-probabilities of the responses of packed rows, without gradient."""
    return packed_logprobs(config, compute, params, rows, temperature)[0]


@partial(jax.jit, static_argnums=(0, 1, 2))
def vision_features(
    config: QwenVLConfig,
    compute: Compute,
    merge: bool,
    params: Params,
    vision: VisionInput[Array],
) -> VisionFeatures[Array]:
    """The features of a batch's images, without gradient; with `merge` those after the merger."""
    return qwen.encode_vision(qwen.bind(config, params), vision, compute, merge)
