"""Topologies by name, and the errors for those that are refused."""

import importlib.util

import jax
import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.perf.device_specs import device_spec
from spatial_ssrl_jax.planning import topology
from spatial_ssrl_jax.planning.gpus import GPUS, Gpu, target_config
from spatial_ssrl_jax.planning.topology import open_topology


def test_the_cpu_is_a_topology():
    found = open_topology("cpu")
    assert list(found.devices) == jax.devices("cpu") and found.spec is None


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_a_gpus_memory_is_that_of_its_datasheet(gpu: Gpu):
    spec, target = device_spec(gpu.name), target_config(gpu)
    assert spec is not None and spec.memory is not None
    assert f"memory_bandwidth: {spec.bandwidth:.0f}\n" in target
    assert f"device_memory_size: {spec.total_memory}\n" in target
    assert spec.memory == int(0.95 * (spec.total_memory or 0))
    assert f"core_count: {gpu.cores}\n" in target


@pytest.mark.parametrize("name", ["v9z:2x2", "v5e", "v5e:4x", "v5e:4x4,slices=0", "tpu", ""])
def test_an_unknown_name_is_refused(name: str):
    with pytest.raises(UserError, match="is not known: give one such as v5e:4x4"):
        open_topology(name)


@pytest.mark.parametrize("name", ["v5p:4x4", "v5e:2x2x2"])
def test_the_axes_are_those_of_the_chip(name: str):
    with pytest.raises(UserError, match=r"has \d axes: a v5. slice has \d"):
        open_topology(name)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the TPU compiler: install it with pip install"):
        open_topology("v5e:2x2")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_slice_that_is_not_offered_is_refused():
    with pytest.raises(UserError, match="v5e:9x9 cannot be compiled for"):
        open_topology("v5e:9x9")
