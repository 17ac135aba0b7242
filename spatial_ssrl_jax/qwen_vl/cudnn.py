"""cuDNN's fused attention by `jax.nn`, and the attention of a whole group made of its calls.

Shape letters: B rows, T tokens, N query heads, K key/value heads, H head size.
"""

import jax
import jax.numpy as jnp
from jax import Array


def attend_group_cudnn(
    q_BTNH: Array, k_BKTH: Array, v_BKTH: Array, valid_BT: Array, prompt: int, response: int
) -> Array:
    """Attention over `[prompt | response 1 | … | response G]`, as `kernels.group_attention`.

    The prompts need no mask; then each response is a row after a copy of its prompt. A mask doubles
    cuDNN's time, and in one call for the whole group all tokens would need one.
    """
    batch, length, heads, size = q_BTNH.shape
    group = (length - prompt) // response
    keys, values = k_BKTH[:, :, :prompt], v_BKTH[:, :, :prompt]
    first = attend_cudnn(q_BTNH[:, :prompt], keys, values, None, causal=True)

    def after_prompts(shared_BKTH: Array, x_BKTH: Array) -> Array:
        own = x_BKTH[:, :, prompt:].reshape(batch, -1, group, response, size).swapaxes(1, 2)
        own = own.reshape(batch * group, -1, response, size)
        return jnp.concatenate((jnp.repeat(shared_BKTH, group, axis=0), own), axis=2)

    # Causality hides the padding after a response; padding itself sees the prompt.
    order = jnp.tril(jnp.ones((response, response), bool))
    rows = (batch * group, response)
    of_prompt = jnp.repeat(valid_BT[:, None, :prompt], group, axis=0)
    seen = jnp.concatenate(
        (jnp.broadcast_to(of_prompt, (*rows, prompt)), jnp.broadcast_to(order, (*rows, response))),
        axis=-1,
    )
    own_q = q_BTNH[:, prompt:].reshape(*rows, heads, size)
    own_keys, own_values = after_prompts(keys, k_BKTH), after_prompts(values, v_BKTH)
    own = attend_cudnn(own_q, own_keys, own_values, seen, causal=False)
    return jnp.concatenate((first, own.reshape(batch, -1, heads, size)), axis=1)


def attend_cudnn(
    q_BTNH: Array, k_BKTH: Array, v_BKTH: Array, seen_BTT: Array | None, causal: bool
) -> Array:
    """cuDNN's fused attention.

    Args:
      q_BTNH, k_BKTH, v_BKTH: queries, keys and values.
      seen_BTT: bool, which keys each query sees, the same for all heads; None is all.
      causal: a query sees no key after it.

    Returns:
      [B, T, N, H] in the dtype of `q`.
    """
    length, keys = q_BTNH.shape[1], k_BKTH.shape[2]
    # JAX gives gradients of even lengths only.
    padding, key_padding = (0, length % 2), (0, keys % 2)
    q = jnp.pad(q_BTNH, ((0, 0), padding, (0, 0), (0, 0)))
    k, v = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), key_padding, (0, 0), (0, 0))) for x in (k_BKTH, v_BKTH)
    )
    if seen_BTT is not None:
        # Padding keys are seen by no query; padding queries see all other keys.
        seen_BTT = jnp.pad(seen_BTT, ((0, 0), padding, (0, 0)), constant_values=True)
        seen_BTT = jnp.pad(seen_BTT, ((0, 0), (0, 0), key_padding))[:, None]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=seen_BTT, is_causal=causal, implementation="cudnn"
    )
    return out[:, :length]
