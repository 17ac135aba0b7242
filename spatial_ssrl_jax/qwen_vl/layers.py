"""What both towers are built from. A weight is declared once: shape, axes, initialiser."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.extend.core import Primitive

from spatial_ssrl_jax.qwen_vl.compute import Remat

Axes = tuple[str | None, ...]  # the logical axis of each of a weight's axes
Tree = TypeVar("Tree")
Layer = TypeVar("Layer", bound=nnx.Module)
Carry = TypeVar("Carry")
Input = TypeVar("Input")
Output = TypeVar("Output")


class Init:
    """Draws float32 weights one after another from a key; `layers` puts a stacked axis in front."""

    def __init__(self, key: Array, layers: int | None = None):
        self._key = key
        self._layers = layers

    def stacked(self, layers: int) -> "Init":
        """The initialiser of `layers` equal layers, whose weights are stacked."""
        self._key, key = jax.random.split(self._key)
        return Init(key, layers)

    def _param(self, value: Array, axes: Axes) -> nnx.Param:
        if self._layers is not None:
            axes = ("layers", *axes)
        return nnx.Param(value, axes=axes)

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self._layers is None else (self._layers, *shape)

    def normal(self, shape: tuple[int, ...], axes: Axes, scale: float) -> nnx.Param:
        """Normal with standard deviation `scale`."""
        self._key, key = jax.random.split(self._key)
        return self._param(scale * jax.random.normal(key, self._shape(shape)), axes)

    def uniform(self, shape: tuple[int, ...], axes: Axes, bound: float) -> nnx.Param:
        """Uniform in [-bound, bound)."""
        self._key, key = jax.random.split(self._key)
        value = jax.random.uniform(key, self._shape(shape), minval=-bound, maxval=bound)
        return self._param(value, axes)

    def fill(self, shape: tuple[int, ...], axes: Axes, value: float) -> nnx.Param:
        """`value` everywhere."""
        return self._param(jnp.full(self._shape(shape), value, jnp.float32), axes)


class Linear(nnx.Module):
    """`x @ kernel + bias` over any number of leading axes.

    The kernel is [*in, *out]; `contract` says how many axes belong to the input. Like every layer
    here it computes in the dtype of `x`, whatever the weights are kept in. Fresh weights keep the
    scale of their input, and are zero where they end a residual branch: a fresh model is its
    embedding and its head, which learns much faster than one of random branches. With an adapter
    (LoRA) `x @ (lora_a * lora_scale) @ lora_b` is added: no gradient of the kernel is needed to
    train it.
    """

    def __init__(
        self,
        init: Init,
        shape: tuple[int, ...],
        axes: Axes,
        *,
        contract: int = 1,
        bias: bool = False,
        ends_branch: bool = False,
    ):
        scale = 0.0 if ends_branch else math.prod(shape[:contract]) ** -0.5
        self.kernel = init.normal(shape, axes, scale)
        self.bias = init.fill(shape[contract:], axes[contract:], 0.0) if bias else None
        self.contract = contract
        self.lora_a, self.lora_b, self.lora_scale = (nnx.data(None) for _ in range(3))

    def adapt(self, init: Init, rank: int, scale: float) -> None:
        """Adds an adapter that changes nothing yet: `lora_a` uniform, `lora_b` zero, as PEFT does.

        Args:
          init: draws it.
          rank: width between `lora_a` and `lora_b`.
          scale: factor of its output; a weight that does not train, so that a tree of weights
            describes its adapters completely.
        """
        shape, axes = self.kernel.shape, self.kernel.axes
        if axes[0] == "layers":
            init = init.stacked(shape[0])
            shape, axes = shape[1:], axes[1:]
        rows, columns = shape[: self.contract], shape[self.contract :]
        into, out = axes[: self.contract], axes[self.contract :]
        self.lora_a = init.uniform((*rows, rank), (*into, None), math.prod(rows) ** -0.5)
        self.lora_b = init.fill((rank, *columns), (None, *out), 0.0)
        self.lora_scale = init.fill((), (), scale)

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)
        rows, columns = x.shape[: x.ndim - self.contract], kernel.shape[self.contract :]
        # As one plain matmul: with more axes, the backward pass copies activations around.
        wide = math.prod(columns)
        flat = x.reshape(math.prod(rows), -1)
        y = jnp.matmul(flat, kernel.reshape(-1, wide))
        a, b, scale = self.lora_a, self.lora_b, self.lora_scale
        if a is not None and b is not None and scale is not None:
            # Scaled before it is cast: a factor rounded to bfloat16 would not be the merged one's.
            a = (a[...] * scale[...]).astype(x.dtype).reshape(flat.shape[1], -1)
            b = b[...].astype(x.dtype).reshape(-1, wide)
            y = y + jnp.matmul(jnp.matmul(flat, a), b)
        y = y.reshape(*rows, *columns)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square normalisation of the last axis in fp32, scaled in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return scale.astype(x.dtype) * x32.astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a scale that trains."""

    def __init__(self, init: Init, size: int, eps: float):
        self.scale = init.fill((size,), (None,), 1.0)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.scale[...], self.eps)


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, init: Init, width: int, inner: int, *, bias: bool, axes: Axes):
        self.gate = Linear(init, (width, inner), axes, bias=bias)
        self.up = Linear(init, (width, inner), axes, bias=bias)
        self.down = Linear(init, (inner, width), axes[::-1], bias=bias, ends_branch=True)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def cast(tree: Tree, dtype: str) -> Tree:
    """Every floating array of a pytree in `dtype`."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


ATTENDED = "attended"  # checkpoint name of a fused attention's results, where it can have one
_CUDNN = "dot_product_attention_fwd"  # prefix of the name of cuDNN's operation, which cannot
_is_kept = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(ATTENDED),
)


def _is_expensive(primitive: Primitive, *avals: Any, **params: Any) -> bool:
    """Whether recomputing an operation is expensive for the memory that its results take.

    Matmuls with weights are, and fused attention, whose results take a tenth of their memory (by
    cuDNN in the vision tower a fifth, for each block keeps results of windows and whole images).
    """
    return primitive.name.startswith(_CUDNN) or _is_kept(primitive, *avals, **params)


REMAT_POLICIES: dict[Remat, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _is_expensive,
}


def scan_layers(
    stack: Layer,
    step: Callable[[Layer, Carry, Input], tuple[Carry, Output]],
    carry: Carry,
    xs: Input,
    *,
    remat: Remat,
) -> tuple[Carry, Output]:
    """Runs `step(layer, carry, x) -> (carry, y)` over a stacked layer's leading axis.

    Args:
      stack: one module whose arrays carry a leading layer axis.
      step: computes one layer; `layer` is the module with that layer's arrays.
      carry: pytree that each layer hands to the next.
      xs: pytree with a leading layer axis, or None.
      remat: what the backward pass recomputes of each layer, by `REMAT_POLICIES`.

    Returns:
      The last carry and the stacked `y`.
    """
    graph, weights = nnx.split(stack)

    def body(carry: Carry, inputs: tuple[nnx.State, Input]) -> tuple[Carry, Output]:
        layer_weights, x = inputs
        return step(nnx.merge(graph, layer_weights), carry, x)

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, carry, (weights, xs))
