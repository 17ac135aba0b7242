"""FLOPs: those that a step needs, from shapes alone, and those of a program, from its jaxpr.

A multiply-add counts as two. What a step needs leaves out padding and recomputation; model FLOPs
utilisation (MFU) is measured by it. Norms, activations and softmax are left out: under 1 %.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend import core

from spatial_ssrl_jax.data.processor import Prompt
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig, TextConfig, VisionConfig
from spatial_ssrl_jax.qwen_vl.family import member_of
from spatial_ssrl_jax.qwen_vl.inputs import Grid
from spatial_ssrl_jax.qwen_vl.splash import BLOCKS_RUN


@dataclass(frozen=True)
class GroupShape:
    """One prompt and the responses to it.

    Attributes:
      prompt: tokens, those of images included.
      grids: patch grids of its images.
      group: samples.
      response: tokens of each sample.
    """

    prompt: int
    grids: tuple[Grid, ...]
    group: int
    response: int

    def alone(self) -> "GroupShape":
        """One sample with a prompt of its own, as in trainers that do not share prompts."""
        return GroupShape(self.prompt, self.grids, 1, self.response)


def vision_flops(config: QwenVLConfig, grids: Sequence[Grid]) -> float:
    """FLOPs of the vision tower's forward pass over the images of one prompt."""
    if not grids:
        return 0.0
    layout = member_of(config).lay_out_patches(config.vision, grids)
    return patches_flops(config.vision, layout.frame, layout.coords)


def patches_flops(config: VisionConfig, frame: np.ndarray, coords: np.ndarray) -> float:
    """FLOPs of the vision tower's forward pass over the patches of one prompt.

    Args:
      config: the vision tower's shape.
      frame: [P] int32, image or temporal frame of each patch.
      coords: [P, 2] int32, row and column of each patch in its image.
    """
    width, side = config.hidden_size, config.window_side * config.spatial_merge_size
    patches = len(frame)
    places = np.concatenate((frame[:, None], coords // side), axis=1)
    _, sizes = np.unique(places, axis=0, return_counts=True)
    window = float((sizes**2).sum())
    full = float(np.sum(np.bincount(frame) ** 2))
    count = config.full_attention_blocks
    attention = 4 * width * (count * full + (config.depth - count) * window)
    wide = width * config.merge_unit
    merger = patches / config.merge_unit * (wide**2 + wide * config.out_hidden_size)
    return 2 * patches * (config.patch_dim * width + config.block_weights) + attention + 2 * merger


def dense_flops(config: TextConfig) -> float:
    """FLOPs of all layers for one token's forward pass, without attention scores."""
    return 2.0 * config.layer_weights


def attention_flops(config: TextConfig, queries: int, before: int) -> float:
    """FLOPs of attention scores and weighted sums in all layers.

    Args:
      config: the language model's shape.
      queries: causal tokens.
      before: tokens before them, which all of them attend to.
    """
    pairs = queries * before + queries * (queries + 1) / 2
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs


def head_flops(config: TextConfig) -> float:
    """FLOPs of the head for one token."""
    return 2.0 * config.hidden_size * config.vocab_size


def batch_flops(
    config: QwenVLConfig, prompts: Sequence[Prompt], length_BG: np.ndarray
) -> tuple[float, float]:
    """FLOPs of one forward pass over prompts, each once, and their responses, without padding.

    Args:
      config: the model's shape.
      prompts: B prompts.
      length_BG: [B, G] int32 tokens of each response.

    Returns:
      FLOPs of the vision tower and of the language model.
    """
    vision = sum(patches_flops(config.vision, p.frame, p.coords) for p in prompts)
    groups = zip(prompts, length_BG[:, None], strict=True)
    return vision, sum(groups_flops(config, len(prompt.ids), length) for prompt, length in groups)


def groups_flops(config: QwenVLConfig, prompt: int, length_BG: np.ndarray) -> float:
    """FLOPs of one pass of the language model over prompts of `prompt` tokens and their groups."""
    text, tokens = config.text, int(length_BG.sum())
    found = (len(length_BG) * prompt + tokens) * dense_flops(text) + tokens * head_flops(text)
    found += len(length_BG) * attention_flops(text, prompt, 0)
    return found + sum(attention_flops(text, n, prompt) for n in length_BG.ravel().tolist())


def group_flops(config: QwenVLConfig, shape: GroupShape, head: bool = True) -> float:
    """FLOPs of one forward pass over a prompt and its group, the prompt once.

    Sampling the group needs as many, for each token is computed once; an update needs three times
    as many.

    Args:
      config: the model's shape.
      shape: the prompt and its group.
      head: whether the head is computed for the response tokens.
    """
    text = config.text
    tokens = shape.prompt + shape.group * shape.response
    return (
        vision_flops(config, shape.grids)
        + tokens * dense_flops(text)
        + attention_flops(text, shape.prompt, 0)
        + shape.group * attention_flops(text, shape.response, shape.prompt)
        + head * shape.group * shape.response * head_flops(text)
    )


def decode_flops(config: QwenVLConfig, shape: GroupShape) -> float:
    """FLOPs of all decode steps of a group: every sampled token through the layers and the head."""
    text, tokens = config.text, shape.group * shape.response
    attention = shape.group * attention_flops(text, shape.response, shape.prompt)
    return tokens * (dense_flops(text) + head_flops(text)) + attention


def step_flops(config: QwenVLConfig, shape: GroupShape, passes: float, shared: bool) -> float:
    """FLOPs of a GRPO step for one prompt: rollout, `passes` of log-probabilities, and update.

    Args:
      config: the model's shape.
      shape: the prompt and its group.
      passes: forward passes for old and reference log-probabilities.
      shared: whether the prompt is computed once a group; else once a sample, in every part.
    """
    whole = (
        group_flops(config, shape) if shared else shape.group * group_flops(config, shape.alone())
    )
    return (1 + passes + 3) * whole


def program_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of the matmuls of a jittable function, with loops' trip counts multiplied in.

    A branch counts as its most expensive side and a `while_loop` as one iteration: which side is
    taken and how many iterations run depend on data.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def jaxpr_flops(
    jaxpr: core.Jaxpr,
    trip_count: float = 1.0,
    expensive_fraction: float = 1.0,
    blocks: int | None = None,
) -> float:
    """`program_flops` of a traced program.

    Args:
      jaxpr: the program.
      trip_count: iterations of each `while_loop`.
      expensive_fraction: how often a branch takes its most expensive side; else it takes the
        cheapest.
      blocks: of a row and head that splash attention computes, inside a call of it.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if not equation.outvars and not equation.effects:
            continue  # rematerialisation leaves such calls, and the compiler drops them
        if name == "dot_general":
            total += _matmul_flops(equation)
            continue
        found = re.search(BLOCKS_RUN + r"(\d+)", str(equation.source_info.name_stack))
        run = int(found[1]) if found else blocks
        if name == "pallas_call":
            total += _kernel_calls(equation, run) * jaxpr_flops(params["jaxpr"])
            continue
        inner = [jaxpr_flops(i, trip_count, expensive_fraction, run) for i in inner_jaxprs(params)]
        if name == "cond":
            total += max(inner) * expensive_fraction + min(inner) * (1 - expensive_fraction)
        elif name == "shard_map":  # its body is one device's shard
            key = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"
            total += sum(inner) * math.prod(params["mesh"].shape[a] for a in params[key])
        else:
            total += sum(inner) * {"scan": params.get("length"), "while": trip_count}.get(name, 1)
    return total


def inner_jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def array_shape(variable: core.Var | core.Literal) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array in a jaxpr.

    Raises:
      TypeError: it is no array.
    """
    if not isinstance(variable.aval, ShapedArray):
        raise TypeError(f"{variable.aval} is no array.")
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def _kernel_calls(equation: core.JaxprEqn, blocks: int | None) -> float:
    """How often a Pallas kernel's body runs; splash skips blocks that its mask hides entirely."""
    whole = float(np.prod(equation.params["grid_mapping"].grid, dtype=float))
    if blocks is None:
        return whole
    block_map = array_shape(equation.invars[1])  # splash's, where it has one
    if not np.issubdtype(block_map.dtype, np.integer):
        return whole
    return whole / float(np.prod(block_map.shape[-2:])) * blocks


def _matmul_flops(equation: core.JaxprEqn) -> float:
    (contract, _), _ = equation.params["dimension_numbers"]
    left, result = array_shape(equation.invars[0]).shape, array_shape(equation.outvars[0]).shape
    summed = np.prod([left[axis] for axis in contract], dtype=float)
    return 2.0 * float(np.prod(result, dtype=float)) * float(summed)
