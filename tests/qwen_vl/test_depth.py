"""Programs over prompts and groups do not grow with depth; decoding writes its cache in place."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.config.schema import GrpoSettings, OptimSettings, SftSettings
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.data.packing import Content, RowShape
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.model import abstract_params
from spatial_ssrl_jax.rl import train_step as update
from spatial_ssrl_jax.rl.logprobs import packed_logprobs
from spatial_ssrl_jax.rl.losses import GrpoLoss
from spatial_ssrl_jax.rl.optimizer import make_optimizer
from spatial_ssrl_jax.rl.row_shapes import empty_group_batch
from spatial_ssrl_jax.rollout.cache import initial_state
from spatial_ssrl_jax.rollout.decode import (
    DecodeSettings,
    decode_chunk,
    decode_weights,
    prefill,
    prefill_program,
)
from spatial_ssrl_jax.rollout.sampling import Sampling, sample_keys

PROMPTS, GROUP, TOKENS, RESPONSE = 2, 4, 64, 256
COMPUTE = Compute(remat="full")
SCANNED = ("prefill", "logprobs", "gradient")


@pytest.fixture(scope="module")
def lower(toy) -> Callable[[str, int], jax.stages.Lowered]:
    """A program of a model with the toy's widths and a number of text layers, not yet compiled."""
    batch = pad_prompts([toy.prompt(i, 20, [(1, 4, 6)]) for i in range(PROMPTS)], TOKENS, 64)
    responses = GROUP * RESPONSE
    shape = RowShape(Content(TOKENS + responses, 64, responses), RESPONSE)
    groups = empty_group_batch(shape, toy.config.vision, PROMPTS)

    def logprobs(config: QwenVLConfig, params, rows):
        return packed_logprobs(config, COMPUTE, params, rows, 1.0)[0]

    def decode(config: QwenVLConfig, params) -> jax.stages.Lowered:
        weights = jax.eval_shape(lambda p: decode_weights(config, p, "float32"), params)
        hidden, prefix = jax.eval_shape(lambda p: prefill(config, COMPUTE, p, batch), params)
        state = jax.eval_shape(
            partial(initial_state, config.text, group=GROUP, slots=256, limit=256), hidden
        )
        keys = jax.eval_shape(lambda: sample_keys(jax.random.key(0), jnp.arange(PROMPTS), GROUP))
        settings = DecodeSettings(Sampling(), (3,), config.vision_tokens, 8)
        return decode_chunk.lower(config, settings, 256, weights, prefix, state, keys)

    def run(name: str, depth: int) -> jax.stages.Lowered:
        config = replace(toy.config, text=replace(toy.config.text, num_hidden_layers=depth))
        params = abstract_params(config)
        if name == "prefill":
            return prefill_program(config, COMPUTE).lower(params, batch)
        if name == "decode":
            return decode(config, params)
        of_config = partial(logprobs, config)
        if name == "gradient":
            loss = GrpoLoss(config, COMPUTE, GrpoSettings(kl_coef=0.0))
            return update.micro_gradients.lower(loss, params, {}, groups)
        if name == "optimizer":
            adamw = make_optimizer(OptimSettings(), SftSettings(), 1)
            state = jax.eval_shape(
                lambda p: update.TrainState(p, {}, adamw.init(p), jnp.int32(0), jnp.int32(0)),
                params,
            )
            return update.apply_gradients.lower(adamw, state, params)
        return jax.jit(of_config).lower(params, groups.rows)

    return run


def cache_bytes(config: QwenVLConfig, depth: int) -> int:
    """Bytes of all samples' keys and values in float32."""
    text = config.text
    rows = PROMPTS * GROUP * text.num_key_value_heads * 256
    return depth * 2 * rows * text.head_dim * 4


@pytest.mark.parametrize("name", SCANNED)
def test_programs_do_not_grow_with_depth(lower, name):
    """As many matmuls for 7 layers as for 3, and no more text but prefill's caches."""
    few, many = (lower(name, depth).as_text() for depth in (3, 7))
    matmuls = few.count("stablehlo.dot_general")
    assert matmuls > 10 and many.count("stablehlo.dot_general") == matmuls
    if name == "prefill":  # each layer's keys and values leave as arrays of their own
        assert len(many.splitlines()) - len(few.splitlines()) <= 4 * 4 * 2
    else:
        assert len(many.splitlines()) == len(few.splitlines())


def test_decoding_writes_its_cache_in_place(lower, toy):
    """The donated caches are the results, and no second copy of even one layer's is made."""
    memory = lower("decode", 2).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes(toy.config, 2)
    assert memory.temp_size_in_bytes < cache_bytes(toy.config, 1)


@pytest.mark.slow
def test_compile_seconds(lower, toy):
    """Seconds and temporary bytes at the 3B's depth and at 4 layers (`pytest -m slow -rP`)."""
    seconds, temporary = {}, {}
    for name in (*SCANNED, "optimizer", "decode"):
        for depth in (4, 36):
            program, before = lower(name, depth), time.perf_counter()
            compiled = program.compile()
            seconds[name, depth] = time.perf_counter() - before
            temporary[name, depth] = compiled.memory_analysis().temp_size_in_bytes
            print(
                f"measured {name} of {depth} layers: {seconds[name, depth]:.1f} s, "
                f"{temporary[name, depth] / 1e6:.2f} MB"
            )
    for name in (*SCANNED, "optimizer"):
        assert seconds[name, 36] < 2 * seconds[name, 4] + 1
    assert np.isclose(temporary["logprobs", 36], temporary["logprobs", 4], rtol=0.1)
    assert temporary["decode", 36] < cache_bytes(toy.config, 1)
