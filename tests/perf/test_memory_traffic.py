"""Bytes from shapes against the known sizes of the 3B and the 7B, and peak rates of devices."""

import math

import jax
import numpy as np
import pytest

from spatial_ssrl_jax.perf.device_specs import device_spec
from spatial_ssrl_jax.perf.memory_traffic import (
    decode_bytes,
    rollout_bytes,
    update_bytes,
    weight_bytes,
)
from spatial_ssrl_jax.qwen_vl.family import read_config
from spatial_ssrl_jax.qwen_vl.model import abstract_params
from spatial_ssrl_jax.rollout.cache import kv_token_bytes


@pytest.mark.parametrize(
    ("size", "weights", "token"), [("3b", 6.17e9, 36.9e3), ("7b", 14.1e9, 57.3e3)]
)
def test_what_a_decode_step_reads(shared, size, weights, token):
    config = read_config(shared / "qwen2_5_vl" / size)
    found = weight_bytes(config, "bfloat16", vision=False)
    assert found == pytest.approx(weights, rel=5e-3)
    assert kv_token_bytes(config.text, "bfloat16") == pytest.approx(token, rel=1e-2)


def test_decode_steps_add_up(toy):
    """Two prompts of 10 tokens, 3 samples of 4 tokens of one and of 1 to 3 of the other."""
    length = np.array([[4, 4, 4], [1, 3, 2]])
    one = kv_token_bytes(toy.config.text, "float32")
    weights = weight_bytes(toy.config, "float32", vision=False)
    read = [2 * 10 + 6 * 1, 2 * 10 + 5 * 2, 2 * 10 + 4 * 3, 10 + 3 * 4]
    steps = sum(weights + tokens * one for tokens in read)
    assert decode_bytes(toy.config, "float32", 10, length) == pytest.approx(steps)
    whole = weight_bytes(toy.config, "float32") + 2 * 10 * one + steps
    assert rollout_bytes(toy.config, "float32", 10, length) == pytest.approx(whole)


def test_an_update_moves_weights_gradients_and_moments(toy):
    """The toy's head is apart, so that a pass does not read its embedding."""
    params = abstract_params(toy.config)
    every = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    read = every - math.prod(params["text"]["embed"].shape)
    assert update_bytes(toy.config, "bfloat16") == 2 * 2 * read + 32 * every


@pytest.mark.parametrize(
    ("kind", "flops", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H100 PCIe", 756e12, 2.0e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12),
        ("TPU v5 lite", 197e12, 819e9),
        ("TPU v5", 459e12, 2765e9),
    ],
)
def test_peak_rates_of_devices(kind: str, flops: float, bandwidth: float):
    spec = device_spec(kind)
    assert spec is not None and (spec.flops, spec.bandwidth) == (flops, bandwidth)


def test_an_unknown_device_has_no_peak_rates():
    assert device_spec("cpu") is None
