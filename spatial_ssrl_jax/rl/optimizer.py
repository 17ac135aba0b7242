"""AdamW with a clipped gradient norm and a learning rate that warms up."""

import math
from typing import Any

import jax
import optax
from jax import Array

from spatial_ssrl_jax.config.schema import OptimSettings, StageSettings
from spatial_ssrl_jax.qwen_vl.param_tree import part_of


def learning_rate(stage: StageSettings, updates: int) -> optax.Schedule:
    """The learning rate at each of a stage's `updates` optimizer steps.

    A warm-up is that of Transformers: its first step has rate 0, and a part of a step is a whole.
    """
    warmup = math.ceil(stage.warmup_ratio * updates)
    peak = stage.learning_rate
    if stage.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(updates - warmup, 1))
    else:
        rest = optax.constant_schedule(peak)
    if warmup == 0:
        return rest
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup])


def make_optimizer(
    optim: OptimSettings, stage: StageSettings, updates: int
) -> optax.GradientTransformation:
    """AdamW as in the paper (arXiv 2510.27606): decay on all trained weights, clipping first."""
    steps = [
        optax.clip_by_global_norm(optim.max_grad_norm),
        optax.adamw(
            learning_rate(stage, updates),
            b1=optim.beta1,
            b2=optim.beta2,
            eps=optim.eps,
            weight_decay=stage.weight_decay,
        ),
    ]
    if stage.vision_learning_rate_scale != 1:
        steps.append(scale_part("vision", stage.vision_learning_rate_scale))
    return optax.chain(*steps)


def scale_part(part: str, scale: float) -> optax.GradientTransformation:
    """Scales one part's learning rate: its weights' updates, decay included, are multiplied.

    Args:
      part: `vision`, `merger` or `language`.
      scale: the factor.
    """

    def update(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        def scaled(path: tuple[Any, ...], x: Array) -> Array:
            name = "/".join(key.key for key in path)
            return x * scale if part_of(name) == part else x

        return jax.tree_util.tree_map_with_path(scaled, updates)

    return optax.stateless(update)
