"""Adapters: no effect at first, the same as merged weights later, and on the targets alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.layers import Linear
from spatial_ssrl_jax.qwen_vl.lora import (
    NO_LORA,
    TARGETS,
    LoraSettings,
    adapter_settings,
    drop_adapters,
    layer_name,
    merge_adapters,
    select_adapters,
)
from spatial_ssrl_jax.qwen_vl.model import abstract_params, bind, init_adapters, param_axes
from spatial_ssrl_jax.qwen_vl.param_tree import merge_params
from spatial_ssrl_jax.rl.logprobs import packed_logprobs
from spatial_ssrl_jax.rollout.decode import decode_weights
from tests.helpers.groups import pack_groups

EVERYWHERE = LoraSettings(rank=3, alpha=12.0, targets=("language", "vision", "merger"))


@pytest.fixture(scope="module")
def fresh(toy):
    return init_adapters(toy.config, EVERYWHERE, jax.random.key(5))


@pytest.fixture(scope="module")
def adapted(toy, fresh):
    """The toy with adapters that have learned something."""
    rng = np.random.default_rng(2)
    learned = jax.tree.map(
        lambda x: x if x.ndim < 2 else x + 0.05 * rng.normal(size=x.shape).astype(np.float32), fresh
    )
    return merge_params(toy.params, learned)


@pytest.fixture(scope="module")
def logprobs(toy):
    """Log-probabilities of fixed responses to two prompts, one with images."""
    prompts = [toy.prompt(1, 6, [(1, 4, 6), (1, 10, 4)]), toy.prompt(2, 9)]
    tokens = np.random.default_rng(3).integers(0, 600, (2, 2, 5)).astype(np.int32)
    length = np.full((2, 2), 5, np.int32)
    rows, _ = pack_groups(toy.config, prompts, tokens, length, [[0, 1]])
    compute = Compute(remat="none")
    return jax.jit(lambda p: packed_logprobs(toy.config, compute, p, rows, 1.0)[0] * rows.mask)


def test_every_linear_layer_but_the_patches_has_a_name(toy):
    model = nnx.eval_shape(lambda: bind(toy.config, toy.params))
    names = {
        layer_name("/".join(path))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and path != ("vision", "patch_embed")
    }
    assert names == {f"{part}.{name}" for part, layers in TARGETS.items() for name in layers}


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("language",), 7), (("language.q", "language.v"), 2), (("vision", "merger.up"), 6)],
)
def test_only_targets_have_adapters(toy, targets: tuple, count: int):
    lora = LoraSettings(2, targets=targets)
    tree = abstract_params(toy.config, lora)
    assert len(jax.tree.leaves(select_adapters(tree))) == 3 * count
    assert drop_adapters(tree) == abstract_params(toy.config)
    assert all(lora.covers(name) for name in adapter_settings(tree).targets)
    assert adapter_settings(abstract_params(toy.config)) == NO_LORA


def test_each_weight_is_declared_with_its_axes(toy):
    axes = param_axes(toy.config, EVERYWHERE)
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda x: len(x.shape), abstract_params(toy.config, EVERYWHERE))
    assert axes["text"]["layers"]["o"]["lora_a"] == ("layers", "heads", "head_dim", None)
    assert axes["text"]["layers"]["q"]["lora_b"] == ("layers", None, "heads", "head_dim")


def test_fresh_adapters_change_nothing(toy, fresh, logprobs):
    flat = traverse_util.flatten_dict(fresh, sep="/")
    assert not any(np.any(x) for path, x in flat.items() if path.endswith("lora_b"))
    assert np.all(flat["text/layers/q/lora_scale"] == 4.0)
    bound = toy.config.text.hidden_size**-0.5
    assert 0.9 * bound < np.abs(flat["text/layers/q/lora_a"]).max() <= bound
    np.testing.assert_array_equal(logprobs(merge_params(toy.params, fresh)), logprobs(toy.params))


def test_merged_weights_compute_the_same_as_adapters(toy, adapted, logprobs, measure):
    merged = merge_adapters(adapted, "float32")
    assert adapter_settings(merged) == NO_LORA
    apart, inside, before = (logprobs(p) for p in (adapted, merged, toy.params))
    assert np.abs(apart - before).max() > 0.1
    assert measure("merged against adapters", inside, apart) < 1e-5


def test_a_merged_kernel_is_the_matmul_written_out(toy, adapted):
    merged = merge_adapters(adapted, "float32")["text"]["layers"]["o"]["kernel"]
    layer = {k: np.asarray(x[1], np.float64) for k, x in adapted["text"]["layers"]["o"].items()}
    change = np.einsum("nhr,rd->nhd", layer["lora_a"], layer["lora_b"]) * 4.0
    np.testing.assert_allclose(merged[1], layer["kernel"] + change, rtol=1e-5, atol=1e-6)


def test_decoding_has_the_merged_weights(toy, adapted):
    found = decode_weights(toy.config, adapted, "float32")
    merged = decode_weights(toy.config, merge_adapters(adapted, "float32"), "float32")
    assert jax.tree.structure(found) == jax.tree.structure(merged)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_alpha_is_twice_the_rank_unless_given():
    assert LoraSettings(8).scale == 2.0
    assert LoraSettings(8, alpha=4.0).scale == 0.5


def test_a_bfloat16_base_is_merged_in_float32(toy, adapted):
    mixed = merge_params(
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.params), select_adapters(adapted)
    )
    kernel = merge_adapters(mixed, "float32")["text"]["layers"]["q"]["kernel"]
    base = toy.params["text"]["layers"]["q"]["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    change = merge_adapters(adapted, "float32")["text"]["layers"]["q"]["kernel"]
    change = change - toy.params["text"]["layers"]["q"]["kernel"]
    np.testing.assert_allclose(kernel, base + change, atol=1e-6)
