"""One optimizer step over micro-batches; the same for supervised training and GRPO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from spatial_ssrl_jax.learn.batch import ResponseBatch
from spatial_ssrl_jax.qwen2_5_vl.model import Params

LossFunction = Callable[[Params, ResponseBatch], tuple[Array, dict[str, Array]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What training carries from step to step, and what a checkpoint holds.

    Attributes:
      params: master weights, float32.
      opt_state: the optimizer's state.
      updates: [] int32 optimizer steps done in this stage.
      skipped: [] int32 non-finite optimizer steps in a row.
    """

    params: Params
    opt_state: Any
    updates: Array
    skipped: Array


def new_state(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    """The state before a stage's first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, jax.jit(optimizer.init)(params), zero, jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnums=0)
def _gradients(loss: LossFunction, params: Params, batch: ResponseBatch):
    (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
    return gradients, sums


@partial(jax.jit, donate_argnums=0)
def _add(total: Params, more: Params) -> Params:
    return jax.tree.map(jnp.add, total, more)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _apply(optimizer: optax.GradientTransformation, state: TrainState, gradients: Params):
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm)
    changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)

    def chosen(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    state = TrainState(
        chosen(params, state.params),
        chosen(opt_state, state.opt_state),
        state.updates + finite,
        jnp.where(finite, 0, state.skipped + 1),
    )
    return state, {"optim/gradient_norm": norm, "optim/skipped": 1.0 - finite}


def train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batches: Sequence[ResponseBatch],
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step: gradients of every micro-batch added up, then applied.

    A step whose gradient norm is not finite leaves the state as it was and is counted.

    Args:
      loss: `(params, batch) -> (loss, metrics)`, hashable; its value is a share of the step's mean.
      optimizer: the gradient transformation.
      state: where training stands; donated.
      batches: the micro-batches; buckets may differ.

    Returns:
      The new state and the step's metrics: means over the step's tokens (maxima for `_max`).
    """
    gradients, metrics = None, {}
    for batch in batches:
        more, sums = _gradients(loss, state.params, batch)
        gradients = more if gradients is None else _add(gradients, more)
        for name, value in sums.items():
            join = jnp.maximum if name.endswith("_max") else jnp.add
            metrics[name] = join(metrics[name], value) if name in metrics else value
    state, more = _apply(optimizer, state, gradients)
    return state, metrics | more
