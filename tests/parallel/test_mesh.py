"""The mesh: sizes that do not fit and axes that do not divide are named."""

import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import MeshSettings
from spatial_ssrl_jax.parallel.collectives import local_shards
from spatial_ssrl_jax.parallel.compiler import set_compiler_flags
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch):
    """Eight devices that are only counted; a mesh over them is its sizes."""
    monkeypatch.setattr(jax, "devices", lambda: [None] * 8)
    monkeypatch.setattr(
        jax, "make_mesh", lambda sizes, axes, **_: dict(zip(axes, sizes, strict=True))
    )


def on(**shape: int) -> Layout:
    """A layout over a mesh of these sizes, without devices: shapes can be checked, not placed."""
    return Layout(SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1} | shape))


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((1, 1, -1), (1, 1, 8)),
        ((2, 4, 1), (2, 4, 1)),
    ],
)
def test_one_axis_takes_what_is_left(eight, given: tuple, sizes: tuple):
    assert tuple(make_mesh(MeshSettings(*given)).values()) == sizes


@pytest.mark.parametrize(
    "given", [(3, -1, 1), (1, 4, 1), (16, 1, 1), (-1, -1, 1), (0, -1, 1), (-2, -1, 1), (16, -1, 1)]
)
def test_sizes_that_do_not_fit_are_named(eight, given: tuple):
    with pytest.raises(UserError, match=r"mesh data=-?\d+ x fsdp=.*8 devices.*config\.mesh"):
        make_mesh(MeshSettings(*given))


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({"fsdp": 5}, r"its axis embed of \d+ does not divide by mesh.fsdp=5"),
        ({"tensor": 3}, r"its axis \w+ of \d+ does not divide by mesh.tensor=3"),
    ],
)
def test_an_axis_that_does_not_divide_is_named(toy, shape: dict, named: str):
    with pytest.raises(UserError, match=named):
        on(**shape).param_shardings(toy.config)


def test_more_shards_than_key_heads_replicate_them(toy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("spatial_ssrl_jax.parallel.sharding.NamedSharding", lambda mesh, spec: spec)
    layout = on(tensor=4)
    key, query = ("embed", "kv_heads", None), ("embed", "heads", None)
    assert layout.sharding("k", key, (48, 2, 12)) == PartitionSpec(None, None, None)
    assert layout.sharding("q", query, (48, 4, 12)) == PartitionSpec(None, "tensor", None)
    with pytest.raises(UserError, match="kv_heads of 6 does not divide by mesh.tensor=4"):
        layout.sharding("k", key, (48, 6, 12))


def test_adapters_are_sharded_as_their_kernels(toy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("spatial_ssrl_jax.parallel.sharding.NamedSharding", lambda mesh, spec: spec)
    layers = on(fsdp=2, tensor=2).param_shardings(toy.config, LoraSettings(3))["text"]["layers"]
    assert layers["q"]["lora_a"] == PartitionSpec(None, "fsdp", None)
    assert layers["q"]["lora_b"] == PartitionSpec(None, None, "tensor", None)
    assert layers["mlp"]["down"]["lora_a"] == PartitionSpec(None, "tensor", None)
    assert layers["mlp"]["down"]["lora_b"] == PartitionSpec(None, None, "fsdp")


@pytest.fixture
def fake_meshes(monkeypatch: pytest.MonkeyPatch):
    """Meshes and shardings as plain values, so that no devices are needed."""
    made = lambda grid, axes, **_: SimpleNamespace(  # noqa: E731
        devices=grid, shape=dict(zip(axes, grid.shape, strict=True))
    )
    monkeypatch.setattr("spatial_ssrl_jax.parallel.sharding.Mesh", made)
    monkeypatch.setattr("spatial_ssrl_jax.parallel.sharding.NamedSharding", lambda mesh, spec: spec)


def test_sampling_has_the_same_devices_in_the_same_order(fake_meshes):
    """As data x tensor: widths are not sharded any more, heads are."""
    train = Layout(SimpleNamespace(devices=np.arange(8).reshape(2, 2, 2)))
    rollout = train.rollout(4)
    assert rollout.mesh.devices.ravel().tolist() == list(range(8)) and rollout.batch_shards == 2
    query = rollout.sharding("q", ("embed", "heads", None), (48, 4, 12))
    assert query == PartitionSpec(None, "tensor", None)
    cache = rollout.sharding("a cache", ("batch", "kv_heads", None, None), (4, 4, 9, 12))
    assert cache == PartitionSpec(("data", "fsdp"), "tensor", None, None)
    with pytest.raises(UserError, match="rollout.tensor=3 must divide the 8 devices"):
        train.rollout(3)
    with pytest.raises(UserError, match="q: its axis heads of 6 does not .* rollout.tensor=4"):
        rollout.sharding("q", ("heads",), (6,))
    with pytest.raises(UserError, match="axis batch of 3 does .* rollout.data x rollout.fsdp=2"):
        rollout.sharding("a cache", ("batch",), (3,))


def test_slices_are_along_data(fake_meshes):
    """Neighbours along the other axes are of one slice, whatever order the devices come in."""

    class Chip(SimpleNamespace):
        platform, device_kind, process_index, core_on_chip = "tpu", "TPU v0", 0, 0

        def __hash__(self):
            return self.id

    chips = [Chip(id=i, slice_index=i % 2, coords=(i // 2, 0, 0)) for i in range(8)]
    mesh = make_mesh(MeshSettings(data=2), chips)
    assert mesh.shape == {"data": 2, "fsdp": 4, "tensor": 1}
    for part in mesh.devices:
        assert len({chip.slice_index for chip in part.ravel()}) == 1
    with pytest.raises(UserError, match=r"mesh.data=1 must be a multiple of the 2 slices"):
        make_mesh(MeshSettings(), chips)


def test_the_batch_is_sharded_over_data_and_fsdp():
    assert on(data=2, fsdp=4, tensor=2).batch_shards == 8


def test_a_batch_comes_back_as_it_was_put():
    layout = Layout(make_mesh(MeshSettings()))
    tree = {"ids": np.arange(6, dtype=np.int32).reshape(2, 3), "scale": np.float32(0.5)}
    put = layout.put_batch(tree)
    assert isinstance(put["ids"], jax.Array) and put["ids"].dtype == np.int32
    back = {"ids": local_shards(put["ids"], put["ids"].sharding), "scale": float(put["scale"])}
    assert np.array_equal(back["ids"], tree["ids"]) and back["scale"] == tree["scale"]


FLAGS = {
    "LIBTPU_INIT_ARGS": "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
    "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_dynamic_slice_fusion=false",
}


@pytest.mark.parametrize("variable", FLAGS)
def test_an_option_is_set_once_and_a_users_own_option_stays(
    monkeypatch: pytest.MonkeyPatch, variable: str
):
    found = [SimpleNamespace(name="xla_cuda12")]
    monkeypatch.setattr("spatial_ssrl_jax.parallel.compiler.entry_points", lambda group: found)

    def flags(given: str) -> str:
        for name in FLAGS:
            monkeypatch.setenv(name, given)
        set_compiler_flags()
        set_compiler_flags()
        return os.environ[variable]

    assert flags("") == FLAGS[variable]
    assert flags("--a=1") == f"--a=1 {FLAGS[variable]}"
    for option in FLAGS[variable].split():
        name = option.split("=")[0]
        others = [other for other in FLAGS[variable].split() if other != option]
        assert flags(f"{name}=5") == " ".join([f"{name}=5", *others])
        assert flags(f"{name}_more=5") == f"{name}_more=5 {FLAGS[variable]}"  # another option
    assert flags("options.txt") == "options.txt"
    found.clear()
    assert flags("") == ("" if variable == "XLA_FLAGS" else FLAGS[variable])
