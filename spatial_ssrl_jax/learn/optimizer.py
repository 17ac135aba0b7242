"""AdamW with a clipped gradient norm and a learning rate that warms up."""

import optax

from spatial_ssrl_jax.config import GrpoSettings, OptimSettings, SftSettings


def learning_rate(stage: SftSettings | GrpoSettings, updates: int) -> optax.Schedule:
    """The learning rate at each of a stage's `updates` optimizer steps."""
    rise = round(stage.warmup * updates)
    peak = stage.learning_rate
    if stage.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(updates - rise, 1))
    else:
        rest = optax.constant_schedule(peak)
    if rise == 0:
        return rest
    return optax.join_schedules([optax.linear_schedule(peak / rise, peak, rise), rest], [rise])


def make_optimizer(
    optim: OptimSettings, stage: SftSettings | GrpoSettings, updates: int
) -> optax.GradientTransformation:
    """AdamW as METHOD gives it: decay on all weights, gradient norm clipped first."""
    return optax.chain(
        optax.clip_by_global_norm(optim.max_gradient_norm),
        optax.adamw(
            learning_rate(stage, updates),
            b1=optim.beta1,
            b2=optim.beta2,
            eps=optim.eps,
            weight_decay=stage.weight_decay,
        ),
    )
