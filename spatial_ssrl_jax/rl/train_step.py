"""One optimizer step over micro-batches; the same for supervised training and GRPO."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from spatial_ssrl_jax.parallel import offload
from spatial_ssrl_jax.parallel.mesh import slice_count
from spatial_ssrl_jax.qwen_vl.inputs import Leaf
from spatial_ssrl_jax.qwen_vl.param_tree import Params, merge_params
from spatial_ssrl_jax.rl.batch import GroupBatch, PackedBatch

TrainBatch = TypeVar("TrainBatch", GroupBatch[Array], PackedBatch[Array])
LossFunction = Callable[[Params, TrainBatch], tuple[Array, dict[str, Array]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState(Generic[Leaf]):
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
    opt_state: optax.OptState
    updates: Leaf
    skipped: Leaf

    @property
    def params(self) -> Params:
        """The whole model, adapters included."""
        return merge_params(self.trained, self.frozen)


def abstract_train_state(
    optimizer: optax.GradientTransformation, trained: Params, frozen: Params
) -> TrainState[jax.ShapeDtypeStruct]:
    """A state's shapes, dtypes and shardings, from arrays or from `jax.ShapeDtypeStruct`s.

    The optimizer's moments are sharded as their weights, counters are replicated.
    """
    first = jax.tree.leaves(trained)[0].sharding
    replicated = NamedSharding(first.mesh, P()) if isinstance(first, NamedSharding) else first

    def abstract(x: Any, sharding: Sharding = replicated) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    opt_state = optax.tree.map_params(
        optimizer,
        lambda x, weight: abstract(x, weight.sharding),
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=abstract,
    )
    like = partial(jax.tree.map, lambda x: abstract(x, x.sharding))
    count = abstract(jax.ShapeDtypeStruct((), jnp.int32))
    return TrainState(like(trained), like(frozen), opt_state, count, count)


def initial_train_state(
    optimizer: optax.GradientTransformation, trained: Params, frozen: Params | None = None
) -> TrainState[Array]:
    """The state before a stage's first step."""
    frozen = frozen or {}
    like = abstract_train_state(optimizer, trained, frozen)
    rest = (like.opt_state, like.updates, like.skipped)

    def zeros(trained: Params) -> tuple[optax.OptState, Array, Array]:
        return optimizer.init(trained), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)

    program = jax.jit(zeros, out_shardings=jax.tree.map(lambda x: x.sharding, rest))
    return TrainState(trained, frozen, *program(trained))


def param_shardings(trained: Params) -> tuple[NamedSharding, ...]:
    """The shardings of weights on a mesh, in the order of their leaves; empty without a mesh.

    Normalised: an optimizer step gives back `P()` for `P(None, None)`, and a program that is given
    another sharding is compiled again.
    """
    found = [x.sharding for x in jax.tree.leaves(trained)]
    on_mesh = [sharding for sharding in found if isinstance(sharding, NamedSharding)]
    if len(on_mesh) < len(found):
        return ()
    return tuple(NamedSharding(sharding.mesh, _shortest(sharding.spec)) for sharding in on_mesh)


def gradient_shardings(trained: Params) -> tuple[NamedSharding, ...]:
    """The shardings of gradients: those of their weights, on several TPU slices over `data` too.

    Each slice has whole weights, so that no matmul waits for the network between them; the sums are
    not needed whole before the optimizer's step. What does not divide is sharded as its weight.
    """
    leaves, shardings = jax.tree.leaves(trained), param_shardings(trained)
    if not shardings or slice_count(shardings[0].mesh) == 1:
        return shardings
    return tuple(map(_finer, leaves, shardings))


def _finer(weight: Array, sharding: NamedSharding) -> NamedSharding:
    sizes, spec = sharding.mesh.shape, list(sharding.spec)
    if "fsdp" not in spec:
        return sharding
    axis = spec.index("fsdp")
    if weight.shape[axis] % (sizes["fsdp"] * sizes["data"]):
        return sharding
    spec[axis] = ("fsdp", "data")
    return NamedSharding(sharding.mesh, P(*spec))


def _shortest(spec: P) -> P:
    """The same without unsharded axes at its end."""
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


@partial(jax.jit, static_argnums=(0, 4))
def micro_gradients(
    loss: LossFunction[TrainBatch],
    trained: Params,
    frozen: Params,
    batch: TrainBatch,
    shardings: tuple[NamedSharding, ...] = (),
) -> tuple[Params, dict[str, Array]]:
    """Gradients of one micro-batch, and its share of the step's metrics.

    Args:
      loss: as `train_step` takes it.
      trained, frozen: the model.
      batch: the micro-batch.
      shardings: `gradient_shardings(trained)`: gradients are sharded layer by layer, or whole ones
        pile up.
    """

    def of_trained(trained: Params) -> tuple[Array, dict[str, Array]]:
        return loss(merge_params(trained, frozen), batch)

    (_, sums), gradients = jax.value_and_grad(of_trained, has_aux=True)(trained)
    return _constrained(gradients, shardings), sums


def _constrained(gradients: Params, shardings: tuple[NamedSharding, ...]) -> Params:
    if not shardings:
        return gradients
    target = jax.tree.unflatten(jax.tree.structure(gradients), shardings)
    return jax.lax.with_sharding_constraint(gradients, target)


@partial(jax.jit, donate_argnums=0)
def add_gradients(total: Params, more: Params) -> Params:
    """Their sum; `total` is donated."""
    return jax.tree.map(jnp.add, total, more)


@partial(jax.jit, static_argnums=(0, 3), donate_argnums=1)
def apply_gradients(
    optimizer: optax.GradientTransformation,
    state: TrainState[Array],
    gradients: Params,
    shardings: tuple[NamedSharding, ...] = (),
) -> tuple[TrainState[Array], dict[str, Array]]:
    """The state after an optimizer step, or as it was where the gradients are not finite.

    Args:
      optimizer: the gradient transformation.
      state: donated; its frozen weights must be left out.
      gradients: of the whole step.
      shardings: `param_shardings(state.trained)`: finer gradients are gathered to them.
    """
    gradients = _constrained(gradients, shardings)
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
    loss: LossFunction[TrainBatch],
    optimizer: optax.GradientTransformation,
    state: TrainState[Array],
    batches: Iterable[TrainBatch],
) -> tuple[TrainState[Array], dict[str, Array]]:
    """One optimizer step: gradients of every micro-batch added up, then applied.

    A step whose gradient norm is not finite leaves the state as it was and is counted.

    Args:
      loss: `(params, batch) -> (loss, metrics)`, hashable; its value is a share of the step's mean.
      optimizer: the gradient transformation.
      state: the training state; donated, but for the frozen weights.
      batches: the micro-batches, taken one at a time; shapes may differ.

    Returns:
      The new state and the step's metrics: means over the step's tokens (maxima for `_max`).
    """
    gradients, metrics = None, {}
    shardings = gradient_shardings(state.trained)
    for batch in batches:
        more, sums = micro_gradients(loss, state.trained, state.frozen, batch, shardings)
        gradients = more if gradients is None else add_gradients(gradients, more)
        for name, value in sums.items():
            combine = jnp.maximum if name.endswith("_max") else jnp.add
            metrics[name] = combine(metrics[name], value) if name in metrics else value
    frozen, stored = state.frozen, state.opt_state
    # Frozen weights are kept out of what is donated: the KL's reference shares them.
    on_device = replace(state, frozen={}, opt_state=offload.to_device(stored))
    state, more = apply_gradients(optimizer, on_device, gradients, param_shardings(state.trained))
    moments = offload.move_like(state.opt_state, stored)
    return replace(state, frozen=frozen, opt_state=moments), metrics | more
