"""A measured bound: how long a rollout's matrix products take when nothing else is done.

What a machine without a known peak can do at most is measured at the very shapes of the rollout.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from spatial_ssrl_jax.qwen2_5_vl.config import Qwen2_5_VLConfig
from spatial_ssrl_jax.qwen2_5_vl.model import Compute, Params, PromptBatch
from spatial_ssrl_jax.rollout.cache import start
from spatial_ssrl_jax.rollout.engine import DecodeSettings, decode_chunk, fill_weights, prefill
from spatial_ssrl_jax.rollout.sampling import Sampling, row_keys
from spatial_ssrl_jax.run.flops import inner_jaxprs, jaxpr_flops


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
    """Every matrix product of a program in order, loop lengths multiplied in.

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
    config: Qwen2_5_VLConfig,
    compute: Compute,
    params: Params,
    prompts: PromptBatch,
    group: int,
    limit: int,
    check_every: int,
) -> tuple[list[Product], list[Product]]:
    """Products of a rollout's prefill, and of `check_every` decode steps; nothing is computed.

    Args:
      config, compute: as the engine has them.
      params, prompts: arrays or their shapes.
      group, limit: G, and slots of the response cache.
      check_every: steps.
    """
    fill = partial(prefill, config, compute)
    hidden, prefix = jax.eval_shape(fill, params, prompts)
    settings = DecodeSettings(Sampling(), (), config.vision_tokens, check_every)
    weights = jax.eval_shape(partial(fill_weights, config, dtype=compute.dtype), params)
    state = jax.eval_shape(lambda h: start(config.text, h, group, limit, limit), hidden)
    keys = jax.eval_shape(lambda i: row_keys(jax.random.key(0), i, group), prompts.length)
    decode = partial(decode_chunk, config, settings, check_every)
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
    """Each product `count` times; one element of each result goes back into its left operand.

    So no turn can be left out or moved out of the loop, and nothing but products costs time.
    """
    done = []
    for product, (left, right) in zip(products, operands, strict=True):
        once = partial(_do, product, right)
        left = jax.lax.fori_loop(0, product.count, lambda _, x, f=once: f(x), left)
        done.append((left, right))
    return done


def _do(product: Product, right: Array, left: Array) -> Array:
    # Behind the barrier, for else only the element that is taken would be computed.
    result = jax.lax.optimization_barrier(jax.lax.dot_general_p.bind(left, right, **product.params))
    value = result[(0,) * result.ndim].astype(left.dtype)
    return jnp.asarray(left).at[(0,) * left.ndim].set(value)
