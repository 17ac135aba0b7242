"""AdamW with a clipped gradient norm and a learning rate that warms up."""

import optax
from flax import traverse_util

from spatial_ssrl_jax.config.schema import OptimSettings, StageSettings
from spatial_ssrl_jax.qwen_vl.tree import Params, part_of


def learning_rate(stage: StageSettings, updates: int) -> optax.Schedule:
    """The learning rate at each of a stage's `updates` optimizer steps."""
    rise = round(stage.warmup_ratio * updates)
    peak = stage.learning_rate
    if stage.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(updates - rise, 1))
    else:
        rest = optax.constant_schedule(peak)
    if rise == 0:
        return rest
    return optax.join_schedules([optax.linear_schedule(peak / rise, peak, rise), rest], [rise])


def make_optimizer(
    optim: OptimSettings, stage: StageSettings, updates: int
) -> optax.GradientTransformation:
    """AdamW as METHOD gives it: decay on all trained weights, gradient norm clipped first."""
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
    """Multiplies the change of one part's weights, decay included: its learning rate is so scaled.

    Args:
      part: `vision`, `merger` or `language`.
      scale: the factor.
    """

    def update(changes: Params, _: Params | None) -> Params:
        flat = traverse_util.flatten_dict(changes, sep="/")
        scaled = {path: x * scale if part_of(path) == part else x for path, x in flat.items()}
        return traverse_util.unflatten_dict(scaled, sep="/")

    return optax.stateless(update)
