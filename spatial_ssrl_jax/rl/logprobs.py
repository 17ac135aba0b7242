"""Log-probabilities of response tokens: of groups after a shared prompt, and of packed rows."""

from functools import partial

import jax
from jax import Array

from spatial_ssrl_jax.qwen_vl import model as qwen
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import PackedRows, PromptBatch, VisionFeatures, VisionInput
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.rl.batch import ResponseBatch
from spatial_ssrl_jax.rl.head import head_logprobs


def response_logprobs(
    config: QwenVLConfig,
    compute: Compute,
    params: Params,
    prompts: PromptBatch,
    tokens_BGR: Array,
    length_BG: Array,
    temperature: float,
) -> tuple[Array, Array]:
    """Log-softmax of logits/temperature at each response token, and the entropy there.

    Args:
      config: the model's shape.
      compute: dtype, chunks and rematerialisation.
      params: the model.
      prompts: B prompts, each run once for its whole group.
      tokens_BGR: int32 response tokens.
      length_BG: int32 tokens of each response.
      temperature: divides the logits.

    Returns:
      Two [B, G, R] float32 arrays: log-probabilities (differentiable) and entropies in nats
      (not differentiable). Values after a response's length mean nothing.
    """
    model = qwen.bind(config, params)
    hidden = qwen.response_hidden(config, model, prompts, tokens_BGR, length_BG, compute)
    batch, group, response, width = hidden.shape
    logprob, entropy = head_logprobs(
        compute,
        model.text.head_weight(compute.dtype),
        hidden.reshape(batch, group * response, width),
        tokens_BGR.reshape(batch, group * response),
        temperature,
    )
    return logprob.reshape(tokens_BGR.shape), entropy.reshape(tokens_BGR.shape)


def packed_logprobs(
    config: QwenVLConfig, compute: Compute, params: Params, rows: PackedRows
) -> tuple[Array, Array]:
    """Log-softmax of the logits at each response token of packed rows, and the entropy there.

    Returns:
      Two [B, R] float32 arrays as those of `response_logprobs`; padding places mean nothing.
    """
    model = qwen.bind(config, params)
    hidden = qwen.packed_hidden(config, model, rows, compute)
    head = model.text.head_weight(compute.dtype)
    return head_logprobs(compute, head, hidden, rows.labels, 1.0)


@partial(jax.jit, static_argnums=(0, 1, 2))
def logprobs_of(
    config: QwenVLConfig,
    compute: Compute,
    temperature: float,
    params: Params,
    batch: ResponseBatch,
) -> Array:
    """[B, G, R] float32 log-probabilities of a batch's responses, without gradient."""
    return response_logprobs(
        config, compute, params, batch.prompts, batch.tokens, batch.length, temperature
    )[0]


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
