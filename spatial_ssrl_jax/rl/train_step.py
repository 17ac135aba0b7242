"""One optimizer step over micro-batches; the same for supervised training and GRPO."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from spatial_ssrl_jax.parallel import offload
from spatial_ssrl_jax.parallel.mesh import slice_count
from spatial_ssrl_jax.qwen_vl.tree import Params, merge_params
from spatial_ssrl_jax.rl.batch import GroupBatch, PackedBatch

TrainBatch = GroupBatch | PackedBatch
LossFunction = Callable[[Params, TrainBatch], tuple[Array, dict[str, Array]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What training carries from step to step, and what a checkpoint holds.

    Attributes:
      trained: master weights that train, float32.
      frozen: weights that do not, in any dtype; empty when all train.
      opt_state: the optimizer's state, over the trained weights alone.
      updates: [] int32 optimizer steps done in this stage.
      skipped: [] int32 non-finite optimizer steps in a row.
    """

    trained: Params
    frozen: Params
    opt_state: Any
    updates: Array
    skipped: Array

    @property
    def params(self) -> Params:
        """The whole model, adapters included."""
        return merge_params(self.trained, self.frozen)


def abstract_train_state(
    optimizer: optax.GradientTransformation, trained: Params, frozen: Params
) -> TrainState:
    """A state's shapes, dtypes and shardings, from arrays or from `jax.ShapeDtypeStruct`s.

    The optimizer's moments are where their weights are, counters on every device.
    """
    first = jax.tree.leaves(trained)[0].sharding
    everywhere = NamedSharding(first.mesh, P()) if isinstance(first, NamedSharding) else first

    def placed(x: Any, sharding: Sharding = everywhere) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    opt_state = optax.tree.map_params(
        optimizer,
        lambda x, weight: placed(x, weight.sharding),
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=placed,
    )
    like = partial(jax.tree.map, lambda x: placed(x, x.sharding))
    count = placed(jax.ShapeDtypeStruct((), jnp.int32))
    return TrainState(like(trained), like(frozen), opt_state, count, count)


def initial_train_state(
    optimizer: optax.GradientTransformation, trained: Params, frozen: Params | None = None
) -> TrainState:
    """The state before a stage's first step."""
    frozen = frozen or {}
    like = abstract_train_state(optimizer, trained, frozen)
    rest = (like.opt_state, like.updates, like.skipped)

    def zeros(trained: Params) -> tuple[Any, Array, Array]:
        return optimizer.init(trained), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)

    program = jax.jit(zeros, out_shardings=jax.tree.map(lambda x: x.sharding, rest))
    return TrainState(trained, frozen, *program(trained))


def param_shardings(trained: Params) -> tuple[Sharding, ...]:
    """Where weights are on a mesh, in the order of their leaves; empty on a device of its own.

    Said in one way: an optimizer step gives back `P()` for `P(None, None)`, and a program that is
    told another place is compiled anew.
    """
    found = [x.sharding for x in jax.tree.leaves(trained)]
    if not all(isinstance(place, NamedSharding) for place in found):
        return ()
    return tuple(NamedSharding(place.mesh, _shortest(place.spec)) for place in found)


def gradient_shardings(trained: Params) -> tuple[Sharding, ...]:
    """Where gradients are: as their weights, on several TPU slices cut over `data` as well.

    Each slice has whole weights, so that no product waits for the network between them; the sums
    are not needed whole before the optimizer's step. What does not divide stays as the weight is.
    """
    leaves, places = jax.tree.leaves(trained), param_shardings(trained)
    if not places or slice_count(places[0].mesh) == 1:
        return places
    return tuple(map(_finer, leaves, places))


def _finer(weight: Any, place: NamedSharding) -> NamedSharding:
    sizes, spec = place.mesh.shape, list(place.spec)
    if "fsdp" not in spec:
        return place
    at = spec.index("fsdp")
    if weight.shape[at] % (sizes["fsdp"] * sizes["data"]):
        return place
    spec[at] = ("fsdp", "data")
    return NamedSharding(place.mesh, P(*spec))


def _shortest(spec: P) -> P:
    """The same without what is not cut at its end."""
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


@partial(jax.jit, static_argnums=(0, 4))
def micro_gradients(
    loss: LossFunction,
    trained: Params,
    frozen: Params,
    batch: TrainBatch,
    places: tuple[Sharding, ...] = (),
) -> tuple[Params, dict[str, Array]]:
    """Gradients of one micro-batch, and its share of the step's metrics.

    Args:
      loss: as `train_step` takes it.
      trained, frozen: the model.
      batch: the micro-batch.
      places: `gradient_shardings(trained)`: gradients go there layer by layer, or whole ones pile up.
    """

    def of_trained(trained: Params) -> tuple[Array, dict[str, Array]]:
        return loss(merge_params(trained, frozen), batch)

    (_, sums), gradients = jax.value_and_grad(of_trained, has_aux=True)(trained)
    return _placed(gradients, places), sums


def _placed(gradients: Params, places: tuple[Sharding, ...]) -> Params:
    if not places:
        return gradients
    target = jax.tree.unflatten(jax.tree.structure(gradients), places)
    return jax.lax.with_sharding_constraint(gradients, target)


@partial(jax.jit, donate_argnums=0)
def add_gradients(total: Params, more: Params) -> Params:
    """Their sum; `total` is donated."""
    return jax.tree.map(jnp.add, total, more)


@partial(jax.jit, static_argnums=(0, 3), donate_argnums=1)
def apply_gradients(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradients: Params,
    places: tuple[Sharding, ...] = (),
) -> tuple[TrainState, dict[str, Array]]:
    """The state after an optimizer step, or as it was where the gradients are not finite.

    Args:
      optimizer: the gradient transformation.
      state: donated; its frozen weights must be left out.
      gradients: of the whole step.
      places: `param_shardings(state.trained)`: what is cut finer is put together, and stays so.
    """
    gradients = _placed(gradients, places)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm)
    changes, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, changes)

    def chosen(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    state = TrainState(
        chosen(trained, state.trained),
        state.frozen,
        chosen(opt_state, state.opt_state),
        state.updates + finite,
        jnp.where(finite, 0, state.skipped + 1),
    )
    return state, {"optim/gradient_norm": norm, "optim/skipped": 1.0 - finite}


def train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batches: Iterable[TrainBatch],
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step: gradients of every micro-batch added up, then applied.

    A step whose gradient norm is not finite leaves the state as it was and is counted.

    Args:
      loss: `(params, batch) -> (loss, metrics)`, hashable; its value is a share of the step's mean.
      optimizer: the gradient transformation.
      state: where training stands; donated, but for the frozen weights.
      batches: the micro-batches, taken one at a time; buckets may differ.

    Returns:
      The new state and the step's metrics: means over the step's tokens (maxima for `_max`).
    """
    gradients, metrics, places = None, {}, gradient_shardings(state.trained)
    for batch in batches:
        more, sums = micro_gradients(loss, state.trained, state.frozen, batch, places)
        gradients = more if gradients is None else add_gradients(gradients, more)
        for name, value in sums.items():
            merge_params = jnp.maximum if name.endswith("_max") else jnp.add
            metrics[name] = merge_params(metrics[name], value) if name in metrics else value
    frozen, resting = state.frozen, state.opt_state
    # Frozen weights are kept out of what is donated: the KL's reference shares them.
    awake = replace(state, frozen={}, opt_state=offload.to_device(resting))
    state, more = apply_gradients(optimizer, awake, gradients, param_shardings(state.trained))
    moments = offload.like(state.opt_state, resting)
    return replace(state, frozen=frozen, opt_state=moments), metrics | more
