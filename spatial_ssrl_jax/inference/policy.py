"""A model that is ready for inference: parameters on their devices, and what decodes with them."""

from dataclasses import dataclass
from pathlib import Path

from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.param_tree import Params
from spatial_ssrl_jax.rollout.decode import DecodeWeights
from spatial_ssrl_jax.rollout.engine import Engine


@dataclass(frozen=True)
class Policy:
    """A model that is ready to respond.

    Attributes:
      files: folder with its tokenizer and processor files.
      engine: decodes; its `shards` are the layout's.
      layout: shards batches over the mesh.
      params: the model's parameters.
      weights: `engine.fill(params)`.
    """

    files: Path
    engine: Engine
    layout: Layout
    params: Params
    weights: DecodeWeights
