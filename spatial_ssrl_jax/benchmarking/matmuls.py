"""A measured bound: the time of a rollout's matmuls alone.

It gives the peak rate of a machine without a datasheet, at the rollout's own shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.extend import core

from spatial_ssrl_jax.perf.flops import array_shape, inner_jaxprs, jaxpr_flops
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.rollout.cache import initial_state
from spatial_ssrl_jax.rollout.decode import DecodeSettings, decode_chunk, decode_weights, prefill
from spatial_ssrl_jax.rollout.sampling import Sampling, sample_keys

# Left and right operand of each matmul of a list.
Operands = list[tuple[Array, Array]]


@dataclass(frozen=True)
class Matmul:
    """One `dot_general` of a program.

    Attributes:
      left, right: shapes and dtypes of its operands.
      params: the primitive's, so that dimension numbers and result type are the program's.
      count: how often the program runs it.
    """

    left: jax.ShapeDtypeStruct
    right: jax.ShapeDtypeStruct
    params: dict[str, Any]
    count: int


def matmuls_of(jaxpr: core.Jaxpr, times: int = 1) -> list[Matmul]:
    """Every matmul of a program in order, with trip counts multiplied in.

    A branch counts as its most expensive side, and a `while_loop` as one iteration.

    Args:
      jaxpr: the program.
      times: how often it runs.
    """
    found: list[Matmul] = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = map(array_shape, equation.invars)
            found.append(Matmul(left, right, equation.params, times))
        elif equation.primitive.name == "cond":
            branches = [branch.jaxpr for branch in equation.params["branches"]]
            found += matmuls_of(max(branches, key=jaxpr_flops), times)
        else:
            length = equation.params["length"] if equation.primitive.name == "scan" else 1
            for inner in inner_jaxprs(equation.params):
                found += matmuls_of(inner, times * length)
    return found


def rollout_matmuls(
    config: QwenVLConfig,
    compute: Compute,
    params: Params,
    prompts: PromptBatch[Array],
    group: int,
    limit: int,
) -> tuple[list[Matmul], list[Matmul]]:
    """Matmuls of a rollout's prefill, and of one decode step; nothing is computed.

    Args:
      config, compute: as the engine has them.
      params: arrays or their shapes.
      prompts: B prompts.
      group: G, samples a prompt.
      limit: slots of the response cache.
    """
    prefill_program = partial(prefill, config, compute)
    hidden, prefix = jax.eval_shape(prefill_program, params, prompts)
    settings = DecodeSettings(Sampling(), (), config.vision_tokens, check_every=1)
    weights = jax.eval_shape(partial(decode_weights, config, dtype=compute.dtype), params)
    state = jax.eval_shape(lambda h: initial_state(config.text, h, group, limit, limit), hidden)
    keys = jax.eval_shape(lambda i: sample_keys(jax.random.key(0), i, group), prompts.length)
    decode = partial(decode_chunk, config, settings, 1)
    decoded = jax.make_jaxpr(decode)(weights, prefix, state, keys)
    filled = jax.make_jaxpr(prefill_program)(params, prompts)
    return matmuls_of(filled.jaxpr), matmuls_of(decoded.jaxpr)


def replay(
    once: list[Matmul], looped: list[Matmul], trip_count: int
) -> tuple[Callable[[list[Operands]], tuple[Operands, Operands]], list[Operands]]:
    """One jitted program of the matmuls of `once`, and `trip_count` times those of `looped`.

    Every matmul of the lists has operands of its own, so that the weights of a decode step are read
    from memory as in the rollout; a matmul that a scan repeats has the same ones each time.

    Returns:
      The program, and the arrays to call it with.
    """
    drawn = [[_draw(seed, m) for seed, m in enumerate(part)] for part in (once, looped)]

    @jax.jit
    def program(operands: list[Operands]) -> tuple[Operands, Operands]:
        first, later = operands
        first = _run_all(once, first)
        loop = lambda _, operands: _run_all(looped, operands)  # noqa: E731
        return first, jax.lax.fori_loop(0, trip_count, loop, later)

    return program, drawn


def _draw(seed: int, matmul: Matmul) -> tuple[Array, Array]:
    def draw(key: Array, shape: jax.ShapeDtypeStruct) -> Array:
        return (0.02 * jax.random.normal(key, shape.shape)).astype(shape.dtype)

    left, right = jax.random.split(jax.random.key(seed))
    return draw(left, matmul.left), draw(right, matmul.right)


def _run_all(matmuls: list[Matmul], operands: Operands) -> Operands:
    """Each matmul `count` times; one element of each result is written to its smaller operand.

    So no iteration can be left out or moved out of the loop, and hardly anything but matmuls costs
    time: what an update copies is activations, never weights.
    """
    results = []
    for matmul, (left, right) in zip(matmuls, operands, strict=True):
        updates_left = left.size <= right.size
        updated, fixed = (left, right) if updates_left else (right, left)

        def once(
            updated: Array,
            matmul: Matmul = matmul,
            fixed: Array = fixed,
            updates_left: bool = updates_left,
        ) -> Array:
            sides = (updated, fixed) if updates_left else (fixed, updated)
            result = jax.lax.dot_general_p.bind(*sides, **matmul.params)
            # The barrier makes the compiler compute all of the result, not just the element read.
            result = jax.lax.optimization_barrier(result)
            value = result[(0,) * result.ndim].astype(updated.dtype)
            return updated.at[(0,) * updated.ndim].set(value)

        if matmul.count == 1:
            updated = once(updated)
        else:
            updated = jax.lax.fori_loop(0, matmul.count, lambda _, x, f=once: f(x), updated)
        results.append((updated, fixed) if updates_left else (fixed, updated))
    return results
