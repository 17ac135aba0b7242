"""Which weights a stage trains: all, some parts, or adapters over a frozen base."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from spatial_ssrl_jax.config.schema import StageSettings
from spatial_ssrl_jax.qwen_vl.lora import ADAPTER_LEAVES, NO_LORA, LoraSettings
from spatial_ssrl_jax.qwen_vl.param_tree import Params, part_of, select_params

Weight = Array | jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Trainable:
    """Selects the weights that `freeze` and `lora` of a stage's section train.

    Attributes:
      freeze: parts that stay as they are, of `vision`, `merger` and `language`.
      lora: with a rank, adapters train and nothing else.
    """

    freeze: tuple[str, ...] = ()
    lora: LoraSettings = NO_LORA

    @classmethod
    def of(cls, stage: StageSettings) -> "Trainable":
        return cls(stage.freeze, stage.lora)

    def __call__(self, path: str) -> bool:
        """Whether the weight at `path` trains."""
        if self.lora.rank:
            return path.rsplit("/", 1)[-1] in ADAPTER_LEAVES
        return part_of(path) not in self.freeze

    def split(self, params: Params, dtype: str) -> tuple[Params, Params]:
        """Splits a tree into what trains and what is frozen.

        Args:
          params: the model, with adapters where they train; arrays or `jax.ShapeDtypeStruct`s.
          dtype: of what is frozen, but for the adapters' scales; the compute dtype loses nothing,
            because every layer casts its weights to it.

        Returns:
          What trains, in float32, and what does not.
        """
        frozen = select_params(params, lambda path: not self(path))

        def frozen_leaf(path: tuple[Any, ...], x: Weight) -> Weight:
            return _cast(x, "float32" if path[-1].key == "lora_scale" else dtype)

        trained = jax.tree.map(lambda x: _cast(x, "float32"), select_params(params, self))
        return trained, jax.tree_util.tree_map_with_path(frozen_leaf, frozen)


def _cast(x: Weight, dtype: str) -> Weight:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=jnp.dtype(dtype))
    return x.astype(dtype)
