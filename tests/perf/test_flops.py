"""FLOPs from shapes against those counted in the programs themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.perf.flops import (
    GroupShape,
    attention_flops,
    decode_flops,
    dense_flops,
    group_flops,
    program_flops,
    vision_flops,
)
from spatial_ssrl_jax.qwen_vl.attention import Visible
from spatial_ssrl_jax.qwen_vl.compute import AttentionKernel, Compute, Remat
from spatial_ssrl_jax.qwen_vl.kernels import self_attention
from spatial_ssrl_jax.qwen_vl.layers import REMAT_POLICIES
from spatial_ssrl_jax.qwen_vl.model import abstract_params
from spatial_ssrl_jax.rl.logprobs import packed_logprobs
from tests.helpers.groups import pack_groups

GRID = (1, 8, 8)  # one full window, so that nothing is padding


def test_matmuls_are_counted_with_their_loops():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert program_flops(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 5
    looped = lambda a, b: jax.lax.scan(lambda c, _: (c, a @ b), 0, None, length=7)[1]  # noqa: E731
    assert program_flops(jax.jit(looped), a, b) == 7 * 2 * 3 * 4 * 5
    batched = lambda x, y: jnp.einsum("bij,bjk->bik", x, y)  # noqa: E731
    assert program_flops(batched, jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))) == 2 * 2 * 3 * 4 * 5


def test_a_dead_call_that_rematerialisation_leaves_is_not_counted():
    """With `dots` the backward pass takes splash's saved result; its call stays in the jaxpr."""
    q, k = jnp.ones((1, 128, 4, 64), jnp.bfloat16), jnp.ones((1, 2, 128, 64), jnp.bfloat16)
    visible = Visible.in_segments(jnp.zeros((1, 128), jnp.int32), causal=True)
    compute = Compute(attention=AttentionKernel("splash", interpret=True))

    def attend(q):
        return self_attention(q, k, k, visible, compute, causal=True)

    def of_gradient(remat: Remat) -> float:
        layer = jax.checkpoint(lambda q: jnp.sin(attend(2 * q)), policy=REMAT_POLICIES[remat])
        return program_flops(jax.grad(lambda q: layer(q).sum()), q)

    assert of_gradient("full") - of_gradient("dots") == program_flops(attend, q) > 0


def test_a_group_needs_what_its_program_does(toy):
    """The program also computes the masked pairs of a short row's square, and nothing else."""
    prompt = toy.prompt(0, 14, [GRID])
    length, group, response = len(prompt.ids), 3, 6
    tokens = np.zeros((1, group, response), np.int32)
    counts = np.full((1, group), response)
    rows, _ = pack_groups(toy.config, [prompt], tokens, counts, [[0]], spare=0)
    done = program_flops(
        lambda p: packed_logprobs(toy.config, Compute(), p, rows, 1.0), abstract_params(toy.config)
    )
    text = toy.config.text
    shape = GroupShape(length, (GRID,), group, response)
    per_pair = attention_flops(text, 1, 0)
    seen = length * (length + 1) / 2
    seen += group * (response * length + response * (response + 1) / 2)
    masked = (length + group * response) ** 2 - seen
    assert done == pytest.approx(group_flops(toy.config, shape) + masked * per_pair, rel=1e-6)


def test_a_groups_forward_pass_is_its_prompt_and_its_decode_steps(toy):
    shape, text = GroupShape(30, (GRID,), 3, 6), toy.config.text
    prompt = 30 * dense_flops(text) + attention_flops(text, 30, 0)
    prompt += vision_flops(toy.config, [GRID])
    decoded = decode_flops(toy.config, shape)
    assert prompt + decoded == pytest.approx(group_flops(toy.config, shape), rel=1e-12)


def test_dense_flops_are_twice_the_weights(toy):
    kernels = jax.tree_util.tree_leaves_with_path(abstract_params(toy.config)["text"]["layers"])
    weights = sum(x.size for path, x in kernels if "kernel" in jax.tree_util.keystr(path))
    assert dense_flops(toy.config.text) == 2 * weights


def test_windows_cost_less_than_full_attention(toy):
    """Two windows side by side: four times the pairs only in the full block."""
    one, two = (vision_flops(toy.config, [g]) for g in (GRID, (1, 8, 16)))
    extra = 4 * toy.config.vision.hidden_size * 2 * 64**2
    assert two == pytest.approx(2 * one + extra)
