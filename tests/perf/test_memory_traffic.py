"""Bytes from shapes against the metrics known of the 3B and the 7B, and peaks of devices."""

import math

import jax
import pytest

from spatial_ssrl_jax.perf.device_specs import device_spec
from spatial_ssrl_jax.perf.flops import GroupShape
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
    """Two prompts of 10 tokens, 3 samples of 4 tokens each, step after step."""
    shape, one = GroupShape(10, (), 3, 4), kv_token_bytes(toy.config.text, "float32")
    weights = weight_bytes(toy.config, "float32", vision=False)
    steps = [weights + 2 * (10 + 3 * (step + 1)) * one for step in range(4)]
    assert decode_bytes(toy.config, "float32", shape, 2) == pytest.approx(sum(steps))
    whole = weight_bytes(toy.config, "float32") + 2 * 10 * one + sum(steps)
    assert rollout_bytes(toy.config, "float32", shape, 2) == pytest.approx(whole)


def test_an_update_moves_weights_gradients_and_moments(toy):
    """The toy's head is apart, so that a pass does not read its embedding."""
    params = abstract_params(toy.config)
    every = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    read = every - math.prod(params["text"]["embed"].shape)
    assert update_bytes(toy.config, "bfloat16") == 2 * 2 * read + 32 * every


def test_peaks_of_devices():
    assert device_spec("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12
    assert device_spec("NVIDIA H100 PCIe").bandwidth == 2.0e12
    assert device_spec("NVIDIA A100-SXM4-40GB").bandwidth == 1.555e12
    assert device_spec("TPU v5 lite").flops == 197e12 and device_spec("TPU v5").flops == 459e12
    assert device_spec("cpu") is None
