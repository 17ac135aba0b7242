"""Which weights a stage trains: all, some parts, or adapters over a base that stays as it is."""

from dataclasses import dataclass

import jax

from spatial_ssrl_jax.config.schema import StageSettings
from spatial_ssrl_jax.qwen_vl.lora import NO_LORA, WEIGHTS, LoraSettings
from spatial_ssrl_jax.qwen_vl.param_tree import Params, part_of, select_params


@dataclass(frozen=True)
class Trainable:
    """The choice that `freeze` and `lora` of a stage's section make.

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
            return path.rsplit("/", 1)[-1] in WEIGHTS
        return part_of(path) not in self.freeze

    def split(self, params: Params, dtype: str) -> tuple[Params, Params]:
        """Takes a tree apart.

        Args:
          params: the model, with adapters where they train; arrays or `jax.ShapeDtypeStruct`s.
          dtype: what is frozen is kept in this, but for the adapters' scales; with the compute
            dtype nothing is lost, because every layer casts its weights to it.

        Returns:
          What trains, in float32, and what does not.
        """
        frozen = select_params(params, lambda path: not self(path))

        def kept(path: tuple, x):
            return _cast(x, "float32" if path[-1].key == "lora_scale" else dtype)

        trained = jax.tree.map(lambda x: _cast(x, "float32"), select_params(params, self))
        return trained, jax.tree_util.tree_map_with_path(kept, frozen)


def _cast(x, dtype: str):
    is_shape = isinstance(x, jax.ShapeDtypeStruct)
    return x.update(dtype=jax.numpy.dtype(dtype)) if is_shape else x.astype(dtype)
