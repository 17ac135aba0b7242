"""A measured bound: how long a rollout's matmuls take when nothing else is done.

What a machine without a known peak can do at most is measured at the very shapes of the rollout.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import Array
from jax.extend import core

from spatial_ssrl_jax.perf.flops import inner_jaxprs, jaxpr_flops
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import PromptBatch
from spatial_ssrl_jax.qwen_vl.model import Params
from spatial_ssrl_jax.rollout.cache import initial_state
from spatial_ssrl_jax.rollout.decode import DecodeSettings, decode_chunk, decode_weights, prefill
from spatial_ssrl_jax.rollout.sampling import Sampling, sample_keys


@dataclass(frozen=True)
class Product:
    """One `dot_general` of a program.

    Attributes:
      left, right: shapes and dtypes of its operands.
      params: the primitive's, so that dimension numbers and result type are the program's.
      count: how often the program does it.
    """

    left: jax.ShapeDtypeStruct
    right: jax.ShapeDtypeStruct
    params: dict[str, Any]
    count: int


def products_of(jaxpr: core.Jaxpr, times: int = 1) -> list[Product]:
    """Every matmuls of a program in order, loop lengths multiplied in.

    Of a branch the dearer side counts, of a `while_loop` one turn.
    """
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (
                jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars
            )
            found.append(Product(left, right, equation.params, times))
        elif equation.primitive.name == "cond":
            branches = [branch.jaxpr for branch in equation.params["branches"]]
            found += products_of(max(branches, key=jaxpr_flops), times)
        else:
            again = equation.params["length"] if equation.primitive.name == "scan" else 1
            for inner in inner_jaxprs(equation.params):
                found += products_of(inner, times * again)
    return found


def rollout_products(
    config: QwenVLConfig,
    compute: Compute,
    params: Params,
    prompts: PromptBatch,
    group: int,
    limit: int,
) -> tuple[list[Product], list[Product]]:
    """Products of a rollout's prefill, and of one decode step; nothing is computed.

    Args:
      config, compute: as the engine has them.
      params, prompts: arrays or their shapes.
      group, limit: G, and slots of the response cache.
    """
    fill = partial(prefill, config, compute)
    hidden, prefix = jax.eval_shape(fill, params, prompts)
    settings = DecodeSettings(Sampling(), (), config.vision_tokens, check_every=1)
    weights = jax.eval_shape(partial(decode_weights, config, dtype=compute.dtype), params)
    state = jax.eval_shape(lambda h: initial_state(config.text, h, group, limit, limit), hidden)
    keys = jax.eval_shape(lambda i: sample_keys(jax.random.key(0), i, group), prompts.length)
    decode = partial(decode_chunk, config, settings, 1)
    decoded = jax.make_jaxpr(decode)(weights, prefix, state, keys)
    return products_of(jax.make_jaxpr(fill)(params, prompts).jaxpr), products_of(decoded.jaxpr)


def replay(once: list[Product], looped: list[Product], turns: int) -> tuple[Any, list]:
    """One jitted program that does the products of `once`, and `turns` times those of `looped`.

    Every product of the list has operands of its own, so that the weights of a decode step are
    read from memory as in the rollout; a product that a scan repeats has the same ones each time.

    Returns:
      The program, and the arrays to call it with.
    """
    operands = [[_draw(i, p) for i, p in enumerate(part)] for part in (once, looped)]

    @jax.jit
    def program(operands):
        first, later = operands
        first = _do_all(once, first)
        return first, jax.lax.fori_loop(0, turns, lambda _, o: _do_all(looped, o), later)

    return program, operands


def _draw(seed: int, product: Product) -> tuple[Array, Array]:
    keys = jax.random.split(jax.random.key(seed))
    return tuple(
        (0.02 * jax.random.normal(key, x.shape)).astype(x.dtype)
        for key, x in zip(keys, (product.left, product.right), strict=True)
    )


def _do_all(products: list[Product], operands: list[tuple[Array, Array]]) -> list:
    """Each product `count` times; one element of each result goes back into its smaller operand.

    So no turn can be left out or moved out of the loop, and hardly anything but products costs
    time: what an update copies is activations, never weights.
    """
    done = []
    for product, (left, right) in zip(products, operands, strict=True):
        moves_left = left.size <= right.size
        moving, fixed = (left, right) if moves_left else (right, left)

        def once(moving: Array, product=product, fixed=fixed, moves_left=moves_left) -> Array:
            sides = (moving, fixed) if moves_left else (fixed, moving)
            result = jax.lax.dot_general_p.bind(*sides, **product.params)
            # After the barrier, for else only the element that is taken would be computed.
            result = jax.lax.optimization_barrier(result)
            value = result[(0,) * result.ndim].astype(moving.dtype)
            return moving.at[(0,) * moving.ndim].set(value)

        if product.count == 1:
            moving = once(moving)
        else:
            moving = jax.lax.fori_loop(0, product.count, lambda _, x, f=once: f(x), moving)
        done.append((moving, fixed) if moves_left else (fixed, moving))
    return done
