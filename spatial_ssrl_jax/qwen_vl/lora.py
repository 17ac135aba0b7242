"""Low-rank adapters (LoRA): which layers have one, and how they are merged into the kernel.

An adapter is in the parameter tree beside its kernel, as `lora_a`, `lora_b` and `lora_scale`. A
model computes with the adapters that its tree holds; without any it is the plain model.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from spatial_ssrl_jax.common.bounds import NonNegative, Whole
from spatial_ssrl_jax.qwen_vl.layers import Init, Linear
from spatial_ssrl_jax.qwen_vl.param_tree import Params, flatten_params, part_of, select_params

# The layers of each part that may have an adapter: all but the patches' embedding.
TARGETS = {
    "language": ("q", "k", "v", "o", "gate", "up", "down"),
    "vision": ("qkv", "proj", "gate", "up", "down"),
    "merger": ("up", "down"),
}
ADAPTER_LEAVES = ("lora_a", "lora_b")
_LEAVES = (*ADAPTER_LEAVES, "lora_scale")


@dataclass(frozen=True)
class LoraSettings:
    """Adapters (LoRA, arXiv 2106.09685), without dropout.

    Attributes:
      rank: width between `lora_a` and `lora_b`; 0 has no adapters and trains the weights.
      alpha: an adapter's output is multiplied by alpha / rank; 0 means twice the rank.
      targets: parts whose linear layers have an adapter, of `language`, `vision` and `merger`, or
        single layers such as `language.q`; never the embedding or the head.
    """

    rank: Whole = 0
    alpha: NonNegative = 0.0
    targets: tuple[str, ...] = ("language",)

    @property
    def scale(self) -> float:
        """Factor of an adapter's output."""
        return self.alpha / self.rank if self.alpha else 2.0

    def covers(self, layer: str) -> bool:
        """Whether a layer, such as `language.q`, has an adapter."""
        return layer in self.targets or layer.split(".")[0] in self.targets


NO_LORA = LoraSettings()


def known_targets() -> tuple[str, ...]:
    """All that `LoraSettings.targets` may hold."""
    return (*TARGETS, *(f"{part}.{name}" for part, names in TARGETS.items() for name in names))


def layer_name(path: str) -> str:
    """The name of the linear layer at `path`, such as `language.q` for `text/layers/q`."""
    return f"{part_of(path)}.{path.rsplit('/', 1)[-1]}"


def adapt(model: nnx.Module, lora: LoraSettings, key: Array) -> None:
    """Gives every targeted layer of `model` an adapter that changes nothing yet."""
    if not lora.rank:
        return
    init = Init(key)
    for path, module in nnx.iter_modules(model):
        name = "/".join(map(str, path))
        if not isinstance(module, Linear) or name == "vision/patch_embed":
            continue
        if lora.covers(layer_name(name)):
            module.adapt(init, lora.rank, lora.scale)


def adapter_settings(params: Params) -> LoraSettings:
    """Which layers of a tree have an adapter; the rank is that of one of them."""
    flat = flatten_params(params)
    found = {path.removesuffix("/lora_a"): x for path, x in flat.items() if path.endswith("lora_a")}
    if not found:
        return NO_LORA
    rank = next(iter(found.values())).shape[-1]
    return LoraSettings(rank, targets=tuple(sorted(map(layer_name, found))))


def select_adapters(params: Params) -> Params:
    """The adapters alone, their scales included."""
    return select_params(params, lambda path: path.rsplit("/", 1)[-1] in _LEAVES)


def drop_adapters(params: Params) -> Params:
    """The model under the adapters."""
    return select_params(params, lambda path: path.rsplit("/", 1)[-1] not in _LEAVES)


def merge_adapters(params: Params, dtype: str | None) -> Params:
    """The tree with every adapter added to its kernel in float32; all of it in `dtype`.

    Works on a whole tree, and on a part of it or one layer of a stack. None keeps each dtype.
    """
    if "lora_a" in params:
        kernel = params["kernel"]
        kernel = _merged(kernel, *(params[x] for x in _LEAVES), dtype or str(kernel.dtype))
        return {"kernel": kernel} | merge_adapters(
            {k: x for k, x in params.items() if k != "kernel" and k not in _LEAVES}, dtype
        )
    return {
        k: merge_adapters(x, dtype) if isinstance(x, dict) else x.astype(dtype or x.dtype)
        for k, x in params.items()
    }


@partial(jax.jit, static_argnums=4)
def _merged(kernel: Array, a: Array, b: Array, scale: Array, dtype: str) -> Array:
    lead, rank = scale.shape, a.shape[-1]
    a32 = a.astype(jnp.float32).reshape(*lead, -1, rank)
    b32 = b.astype(jnp.float32).reshape(*lead, rank, -1)
    change = jnp.matmul(a32, b32, precision=jax.lax.Precision.HIGHEST)
    change = (change * scale[..., None, None]).reshape(kernel.shape)
    return (kernel.astype(jnp.float32) + change).astype(dtype)
