"""The rollout's matmuls alone: all of them, none twice, and not thrown away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.benchmarking.matmuls import Product, products_of, replay, rollout_products
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.perf.flops import GroupShape, attention_flops, group_flops, program_flops
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.model import abstract_params

GRID = (1, 8, 8)


def flops(products: list[Product]) -> float:
    total = 0.0
    for product in products:
        (contract, _), _ = product.params["dimension_numbers"]
        summed = np.prod([product.left.shape[axis] for axis in contract])
        out = jax.eval_shape(
            lambda a, b, p=product.params: jax.lax.dot_general_p.bind(a, b, **p),
            product.left,
            product.right,
        )
        total += 2 * product.count * out.size * summed
    return total


def test_a_loop_s_products_are_found_with_their_count():
    def program(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a @ b, None, length=3)[0]

    a, b = jnp.ones((2, 4)), jnp.ones((4, 4))
    products = products_of(jax.make_jaxpr(program)(a, b).jaxpr)
    assert [product.count for product in products] == [1, 3]
    assert products[0].left.shape == (2, 4) and products[0].right.shape == (4, 4)


def test_a_rollout_s_products_are_those_that_it_needs(toy):
    """But for what is masked: half of the prompt's square, and slots that nothing is in yet."""
    prompt = toy.prompt(0, 14, [GRID])
    length, group, limit = len(prompt.ids), 3, 8
    batch = pad_prompts([prompt], (length,), (1,))
    params = abstract_params(toy.config)
    once, looped = rollout_products(toy.config, Compute(), params, batch, group, limit)
    done = flops(once) + limit * flops(looped)
    needed = group_flops(toy.config, GroupShape(length, (GRID,), group, limit))
    masked = length * (length - 1) / 2 + group * limit * (limit - 1) / 2
    assert done == pytest.approx(needed + masked * attention_flops(toy.config.text, 1, 0), rel=1e-6)


def test_the_replay_does_every_product():
    """Each changes one element of its smaller operand, as often as it is done."""
    a, b = jnp.ones((2, 3)), jnp.ones((3, 4))
    once = products_of(jax.make_jaxpr(lambda a, b: a @ b)(a, b).jaxpr)
    program, operands = replay(once, once, turns=2)
    assert program_flops(program, operands) == 2 * flops(once) + flops(once)
    first, later = program(operands)
    for turns, before, after in ((1, operands[0], first), (2, operands[1], later)):
        (left, right), (found, same) = before[0], after[0]
        for _ in range(turns):
            left = left.at[0, 0].set((left @ right)[0, 0])
        np.testing.assert_allclose(found, left, rtol=1e-6)
        np.testing.assert_array_equal(same, right)
