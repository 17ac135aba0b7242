"""What trains: gradients, moments and changes reach it alone, and they are the right ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from spatial_ssrl_jax.config.schema import GrpoSettings, OptimSettings
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings
from spatial_ssrl_jax.qwen_vl.model import init_adapters
from spatial_ssrl_jax.qwen_vl.param_tree import PARTS, merge_params, part_of
from spatial_ssrl_jax.rl import train_step as update
from spatial_ssrl_jax.rl.losses import SftLoss
from spatial_ssrl_jax.rl.optimizer import make_optimizer, scale_part
from spatial_ssrl_jax.rl.train_step import (
    abstract_train_state,
    gradient_shardings,
    initial_train_state,
    param_shardings,
    train_step,
)
from spatial_ssrl_jax.rl.trainable import Trainable
from tests.rl.conftest import CONFIG

LOSS = SftLoss(CONFIG, Compute(attention_chunk=16, vocab_block=32, remat="none"))
LORA = Trainable(lora=LoraSettings(rank=2, alpha=6.0, targets=("language", "vision.qkv")))


def flat(tree) -> dict:
    return traverse_util.flatten_dict(jax.device_get(tree), sep="/")


@pytest.fixture(scope="module")
def gradients(small_params, packed_batch) -> dict:
    """The gradient of every weight."""
    return flat(jax.jit(jax.grad(lambda p, b: LOSS(p, b)[0]))(small_params, packed_batch))


@pytest.fixture(scope="module")
def adapted(small_params):
    """The small model with adapters that change nothing yet."""
    return merge_params(small_params, init_adapters(CONFIG, LORA.lora, jax.random.key(1)))


def stepped(trainable: Trainable, params, batch, optimizer):
    """A state over copies of `params`, before and after a step."""
    trained, frozen = trainable.split(params, "float32")
    state = initial_train_state(optimizer, jax.tree.map(jnp.array, trained), frozen)
    before = flat((state.params,)[0])
    state, metrics = train_step(LOSS, optimizer, state, [batch])
    return before, state, metrics


@pytest.mark.parametrize("freeze", [("vision",), ("language", "merger")], ids="+".join)
def test_frozen_parts_stay_and_the_others_have_their_own_gradient(
    small_params, packed_batch, gradients, freeze: tuple
):
    before, state, metrics = stepped(Trainable(freeze), small_params, packed_batch, optax.sgd(1.0))
    after = flat(state.params)
    assert after.keys() == gradients.keys()
    trained = {path for path in after if part_of(path) not in freeze}
    norm = np.sqrt(sum(float(np.sum(gradients[path] ** 2.0)) for path in trained))
    assert float(metrics["optim/gradient_norm"]) == pytest.approx(norm, rel=1e-4)
    for path, weight in after.items():
        if path in trained:
            scale = np.abs(gradients[path]).max()
            change = before[path] - weight
            assert np.abs(change - gradients[path]).max() < 2e-3 * scale + 1e-6, path
        else:
            assert weight.tobytes() == before[path].tobytes(), path


def test_an_adapters_gradient_is_its_kernels_by_the_chain_rule(
    small_params, packed_batch, gradients, adapted
):
    before, state, _ = stepped(LORA, adapted, packed_batch, optax.sgd(1.0))
    after = flat(state.params)
    assert flat(state.trained).keys() == {
        path for path in after if path.endswith(("lora_a", "lora_b"))
    }
    for path, weight in after.items():
        if not path.endswith("lora_b"):
            # With lora_b at zero nothing reaches lora_a.
            assert weight.tobytes() == before[path].tobytes(), path
            continue
        module = path.removesuffix("/lora_b")
        a, kernel = before[f"{module}/lora_a"], gradients[f"{module}/kernel"]
        layers, rank = len(a), a.shape[-1]
        a = a.reshape(layers, -1, rank)
        wanted = 3.0 * a.swapaxes(1, 2) @ kernel.reshape(layers, a.shape[1], -1)
        got = -weight.reshape(wanted.shape)
        assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max(), path


def test_the_optimizer_knows_only_what_trains(small_params, adapted):
    optimizer = make_optimizer(OptimSettings(), GrpoSettings(weight_decay=0.0), 4)
    for trainable, params in (
        (Trainable(("vision", "language")), small_params),
        (LORA, adapted),
        (Trainable(), small_params),
    ):
        trained, frozen = trainable.split(params, "float32")
        state = abstract_train_state(optimizer, trained, frozen)
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
        assert len(moments) == 2 * len(jax.tree.leaves(trained))
        assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(trained))
        assert flat_paths(state.params) == flat_paths(params)


def flat_paths(tree) -> set[str]:
    return set(traverse_util.flatten_dict(tree, sep="/"))


def test_what_is_frozen_is_kept_in_the_compute_dtype(adapted):
    trained, frozen = LORA.split(adapted, "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    kept = {path: x.dtype for path, x in flat(frozen).items()}
    scales = {path for path in kept if path.endswith("lora_scale")}
    assert {kept[path] for path in scales} == {jnp.dtype("float32")}
    assert {kept[path] for path in kept.keys() - scales} == {jnp.dtype("bfloat16")}
    assert flat_paths(merge_params(trained, frozen)) == flat_paths(adapted)


def test_frozen_weights_are_not_donated(small_params, packed_batch):
    """The KL's reference shares them."""
    trained, frozen = Trainable(("vision", "language")).split(small_params, "float32")
    frozen = jax.tree.map(jnp.array, frozen)
    state = initial_train_state(optax.sgd(1.0), jax.tree.map(jnp.array, trained), frozen)
    train_step(LOSS, optax.sgd(1.0), state, [packed_batch])
    assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.trained))


def test_equivalent_shardings_are_normalised_to_one():
    """An optimizer step gives back `P()` for `P(None, None)`: gradients were compiled twice."""
    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"))

    def placed(*axes: str | None) -> dict[str, jax.ShapeDtypeStruct]:
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=place)}

    assert param_shardings(placed(None, None)) == param_shardings(placed())
    assert param_shardings(placed("fsdp", None)) == param_shardings(placed("fsdp"))
    assert param_shardings(placed(None, "fsdp")) != param_shardings(placed("fsdp"))


def test_gradients_are_sharded_over_slices_too(monkeypatch: pytest.MonkeyPatch):
    """Where that divides; the parts stay where their weight's are."""

    def placed(data: int, *axes: str | None) -> dict[str, jax.ShapeDtypeStruct]:
        mesh = AbstractMesh((data, 2, 2), ("data", "fsdp", "tensor"))
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=place)}

    def found(data: int, *axes: str | None) -> PartitionSpec:
        return gradient_shardings(placed(data, *axes))[0].spec

    monkeypatch.setattr(update, "slice_count", lambda mesh: mesh.shape["data"])
    assert found(2, "fsdp", "tensor") == PartitionSpec(("fsdp", "data"), "tensor")
    assert found(1, "fsdp", "tensor") == PartitionSpec("fsdp", "tensor")  # one slice
    assert found(2, None, "fsdp") == PartitionSpec(None, "fsdp")  # 6 is not cut in 4
    assert found(2, "tensor") == PartitionSpec("tensor")
    assert gradient_shardings({"kernel": jnp.zeros(4)}) == ()


@pytest.mark.parametrize("part", PARTS)
def test_a_parts_learning_rate_scales_its_change_exactly(small_params, part: str):
    changes = [
        optimizer.update(small_params, optimizer.init(small_params))[0]
        for optimizer in (optax.sgd(0.5), optax.chain(optax.sgd(0.5), scale_part(part, 0.25)))
    ]
    plain, scaled = map(flat, changes)
    for path, change in plain.items():
        factor = 0.25 if part_of(path) == part else 1.0
        np.testing.assert_array_equal(scaled[path], factor * change)


def test_the_visions_learning_rate_scales_its_decay_too(small_params):
    stage = {"learning_rate": 1e-2, "weight_decay": 0.1}
    changes = []
    for scale in (1.0, 0.25):
        settings = GrpoSettings(**stage, vision_learning_rate_scale=scale)
        optimizer = make_optimizer(OptimSettings(), settings, 4)
        update = jax.jit(lambda p, o=optimizer: o.update(p, o.init(p), p)[0])
        changes.append(flat(update(small_params)))
    for path, change in changes[0].items():
        factor = 0.25 if part_of(path) == "vision" else 1.0
        np.testing.assert_allclose(changes[1][path], factor * change, rtol=1e-6)


def test_moments_are_sharded_as_their_weights():
    mesh = AbstractMesh((4,), ("fsdp",))
    cut, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    weight = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=cut)
    state = abstract_train_state(optax.adamw(1e-3), {"kernel": weight}, {})
    placed = {x.shape: x.sharding for x in jax.tree.leaves(state)}
    assert placed == {(8, 3): cut, (): whole}


@pytest.mark.parametrize(
    "settings",
    [
        GrpoSettings(freeze=("vision",)),
        GrpoSettings(freeze=("language", "merger")),
        GrpoSettings(lora=LORA.lora),
        GrpoSettings(lora=LoraSettings(rank=2, targets=("language.q",))),
    ],
    ids=["vision", "language+merger", "lora", "lora of q"],
)
@pytest.mark.parametrize("part", PARTS)
def test_a_stage_trains_the_parts_that_its_settings_name(small_params, settings, part: str):
    adapters = {}
    if settings.lora.rank:
        adapters = init_adapters(CONFIG, settings.lora, jax.random.key(1))
    trained = filter(Trainable.of(settings), flat(merge_params(small_params, adapters)))
    assert settings.trains(part) == any(part_of(path) == part for path in trained)
