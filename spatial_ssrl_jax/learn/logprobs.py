"""Log-probabilities of response tokens, without ever holding the whole logits."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from spatial_ssrl_jax.learn.batch import ResponseBatch
from spatial_ssrl_jax.qwen2_5_vl import model as qwen
from spatial_ssrl_jax.qwen2_5_vl.config import Qwen2_5_VLConfig
from spatial_ssrl_jax.qwen2_5_vl.model import Compute, PackedRows, Params, PromptBatch


def response_logprobs(
    config: Qwen2_5_VLConfig,
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
      (not differentiable). Values behind a response's length mean nothing.
    """
    model = qwen.bind(config, params)
    hidden = qwen.response_hidden(config, model, prompts, tokens_BGR, length_BG, compute)
    batch, group, response, width = hidden.shape
    logprob, entropy = _head_logprobs(
        compute,
        model.text.head_weight(compute.dtype),
        hidden.reshape(batch, group * response, width),
        tokens_BGR.reshape(batch, group * response),
        temperature,
    )
    return logprob.reshape(tokens_BGR.shape), entropy.reshape(tokens_BGR.shape)


def packed_logprobs(
    config: Qwen2_5_VLConfig, compute: Compute, params: Params, rows: PackedRows
) -> tuple[Array, Array]:
    """Log-softmax of the logits at each response token of packed rows, and the entropy there.

    Returns:
      Two [B, R] float32 arrays as those of `response_logprobs`; padding places mean nothing.
    """
    model = qwen.bind(config, params)
    hidden = qwen.packed_hidden(config, model, rows, compute)
    head = model.text.head_weight(compute.dtype)
    return _head_logprobs(compute, head, hidden, rows.labels, 1.0)


@partial(jax.jit, static_argnums=(0, 1, 2))
def logprobs_of(
    config: Qwen2_5_VLConfig,
    compute: Compute,
    temperature: float,
    params: Params,
    batch: ResponseBatch,
) -> Array:
    """[B, G, R] float32 log-probabilities of a batch's responses, without gradient."""
    return response_logprobs(
        config, compute, params, batch.prompts, batch.tokens, batch.length, temperature
    )[0]


def _head_logprobs(
    compute: Compute, head_VD: Array, hidden_BTD: Array, tokens_BT: Array, temperature: float
) -> tuple[Array, Array]:
    """Log-probability of each token and the entropy where it is predicted, two [B, T] arrays."""
    batch, length, width = hidden_BTD.shape
    hidden_BTD = compute.hold(hidden_BTD)
    count = -(-length // compute.head_chunk)
    size = -(-length // count)  # chunks of one size, with as little padding as can be
    pad = count * size - length
    hidden = jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0)))
    tokens = jnp.pad(tokens_BT, ((0, 0), (0, pad)))
    hidden = hidden.reshape(batch, count, size, width).swapaxes(0, 1)
    tokens = tokens.reshape(batch, count, size).swapaxes(0, 1)

    def chunks(head_VD: Array, hidden: Array, tokens: Array) -> tuple[Array, Array]:
        def step(_: None, piece: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
            return None, _chunk_logprobs(temperature, head_VD, *piece)

        return jax.lax.scan(step, None, (hidden, tokens))[1]

    if compute.rows is not None:
        # By hand: the compiler would gather the head and add up its gradient for every chunk anew.
        rows = compute.rows.spec[0]
        chunks = jax.shard_map(
            chunks,
            mesh=compute.rows.mesh,
            in_specs=(P(), P(None, rows), P(None, rows)),
            out_specs=P(None, rows),
            axis_names=set(rows),
            check_vma=False,
        )
    out = chunks(head_VD, hidden, tokens)
    return tuple(x.swapaxes(0, 1).reshape(batch, -1)[:, :length] for x in out)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_logprobs(
    temperature: float, head_VD: Array, hidden_BCD: Array, tokens_BC: Array
) -> tuple[Array, Array]:
    """Log-probabilities and entropies of a chunk; the entropy is a figure, without gradient.

    The backward pass is written out: it works the logits out again and goes over them once, where
    autodiff keeps several copies and scatters into one.
    """
    return _chunk_forward(temperature, head_VD, hidden_BCD, tokens_BC)[0]


def _logits(temperature: float, head_VD: Array, hidden_BCD: Array) -> Array:
    logits = jnp.einsum("bcd,vd->bcv", hidden_BCD, head_VD, preferred_element_type=jnp.float32)
    return logits if temperature == 1 else logits / temperature


def _chunk_forward(temperature: float, head_VD: Array, hidden_BCD: Array, tokens_BC: Array):
    logits = _logits(temperature, head_VD, hidden_BCD)
    top = logits.max(axis=-1, keepdims=True)
    weight = jnp.exp(logits - top)
    whole = weight.sum(axis=-1)
    mean = jnp.sum(weight * (logits - top), axis=-1) / whole
    chosen = jnp.take_along_axis(logits, tokens_BC[..., None], axis=-1)
    total = top[..., 0] + jnp.log(whole)
    found = (chosen[..., 0] - total, jnp.log(whole) - mean)
    return found, (head_VD, hidden_BCD, tokens_BC, total)


def _chunk_backward(temperature: float, kept: tuple[Array, ...], gradients: tuple[Array, Array]):
    head, hidden, tokens, total = kept
    logits = _logits(temperature, head, hidden)
    chosen = jnp.arange(logits.shape[-1]) == tokens[..., None]
    share = gradients[0][..., None] / temperature
    of_logits = (share * (chosen - jnp.exp(logits - total[..., None]))).astype(hidden.dtype)
    of_hidden = jnp.einsum("bcv,vd->bcd", of_logits, head)
    of_head = jnp.einsum("bcv,bcd->vd", of_logits, hidden)
    return of_head.astype(head.dtype), of_hidden.astype(hidden.dtype), None


_chunk_logprobs.defvjp(_chunk_forward, _chunk_backward)
