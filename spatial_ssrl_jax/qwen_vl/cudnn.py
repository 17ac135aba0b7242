"""cuDNN's fused attention by `jax.nn`.

Shape letters: B rows, Q queries, S keys, N query heads, K key/value heads, H head size.
"""

import jax
import jax.numpy as jnp
from jax import Array


def attend_cudnn(
    q_BQNH: Array, k_BKSH: Array, v_BKSH: Array, seen_BQS: Array | None, causal: bool = False
) -> Array:
    """cuDNN's fused attention.

    Args:
      q_BQNH, k_BKSH, v_BKSH: queries, keys and values.
      seen_BQS: bool, which keys each query sees, the same for all heads; None is all.
      causal: a query sees no key after it.

    Returns:
      [B, Q, N, H] in the dtype of `q`; where a query sees no key it means nothing.
    """
    length, keys = q_BQNH.shape[1], k_BKSH.shape[2]
    # JAX gives gradients of even lengths only.
    padding, key_padding = (0, length % 2), (0, keys % 2)
    q = jnp.pad(q_BQNH, ((0, 0), padding, (0, 0), (0, 0)))
    k, v = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), key_padding, (0, 0), (0, 0))) for x in (k_BKSH, v_BKSH)
    )
    if seen_BQS is not None:
        # The softmax of a query without any key is not defined: it sees all of them instead.
        seen_BQS = jnp.pad(seen_BQS, ((0, 0), padding, key_padding))
        seen_BQS = (seen_BQS | ~seen_BQS.any(axis=-1, keepdims=True))[:, None]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=seen_BQS, is_causal=causal, implementation="cudnn"
    )
    return out[:, :length]
