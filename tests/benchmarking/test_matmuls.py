"""The rollout's matmuls alone: all of them, none twice, and not thrown away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_ssrl_jax.benchmarking.matmuls import Matmul, matmuls_of, replay, rollout_matmuls
from spatial_ssrl_jax.data.batching import pad_prompts
from spatial_ssrl_jax.perf.flops import GroupShape, attention_flops, group_flops, program_flops
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.model import abstract_params

GRID = (1, 8, 8)


def flops(matmuls: list[Matmul]) -> float:
    total = 0.0
    for matmul in matmuls:
        (contract, _), _ = matmul.params["dimension_numbers"]
        summed = np.prod([matmul.left.shape[axis] for axis in contract])
        out = jax.eval_shape(
            lambda a, b, p=matmul.params: jax.lax.dot_general_p.bind(a, b, **p),
            matmul.left,
            matmul.right,
        )
        total += 2 * matmul.count * out.size * summed
    return total


def test_a_loops_matmuls_are_found_with_their_count():
    def program(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a @ b, None, length=3)[0]

    a, b = jnp.ones((2, 4)), jnp.ones((4, 4))
    matmuls = matmuls_of(jax.make_jaxpr(program)(a, b).jaxpr)
    assert [matmul.count for matmul in matmuls] == [1, 3]
    assert matmuls[0].left.shape == (2, 4) and matmuls[0].right.shape == (4, 4)


def test_a_rollouts_matmuls_are_those_that_it_needs(toy):
    """Except for masked ones: half of the prompt's square, and slots that are still empty."""
    prompt = toy.prompt(0, 14, [GRID])
    length, group, limit = len(prompt.ids), 3, 8
    batch = jax.tree.map(jnp.asarray, pad_prompts([prompt], length, len(prompt.frame)))
    params = abstract_params(toy.config)
    once, looped = rollout_matmuls(toy.config, Compute(), params, batch, group, limit)
    done = flops(once) + limit * flops(looped)
    needed = group_flops(toy.config, GroupShape(length, (GRID,), group, limit))
    masked = length * (length - 1) / 2 + group * limit * (limit - 1) / 2
    assert done == pytest.approx(needed + masked * attention_flops(toy.config.text, 1, 0), rel=1e-6)


def test_the_replay_runs_every_matmul():
    """Each changes one element of its smaller operand, as often as it is done."""
    a, b = jnp.ones((2, 3)), jnp.ones((3, 4))
    once = matmuls_of(jax.make_jaxpr(lambda a, b: a @ b)(a, b).jaxpr)
    program, operands = replay(once, once, trip_count=2)
    assert program_flops(program, operands) == 2 * flops(once) + flops(once)
    first, later = program(operands)
    for times, before, after in ((1, operands[0], first), (2, operands[1], later)):
        (left, right), (found, same) = before[0], after[0]
        for _ in range(times):
            left = left.at[0, 0].set((left @ right)[0, 0])
        np.testing.assert_allclose(found, left, rtol=1e-6)
        np.testing.assert_array_equal(same, right)
