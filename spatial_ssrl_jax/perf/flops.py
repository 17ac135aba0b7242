"""FLOPs: those that a step needs, from shapes alone, and those that a program does, from its jaxpr.

A multiply-add counts as two. What a step needs leaves out padding and recomputation; it is what
utilisation is measured by. Norms, activations and softmax are left out: under a hundredth.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core

from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig, TextConfig, VisionConfig
from spatial_ssrl_jax.qwen_vl.family import member_of
from spatial_ssrl_jax.qwen_vl.inputs import Grid, PromptBatch
from spatial_ssrl_jax.qwen_vl.kernels import BLOCKS_RUN


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
        """One sample with a prompt of its own, as trainers do it that share nothing."""
        return GroupShape(self.prompt, self.grids, 1, self.response)


def vision_flops(config: QwenVLConfig, grids: Sequence[Grid]) -> float:
    """Forward pass of the vision tower over the images of one prompt."""
    if not grids:
        return 0.0
    layout = member_of(config).lay_out_windows(config.vision, grids)
    return windows_flops(config.vision, layout.frame)


def windows_flops(config: VisionConfig, frame: np.ndarray) -> float:
    """The same from laid-out windows: [W, P] int, the frame of each patch, -1 where none is."""
    width = config.hidden_size
    patches = float((frame >= 0).sum())
    dense = 4 * width**2 + 3 * width * config.intermediate_size
    window = float(((frame >= 0).sum(axis=1) ** 2).sum())
    full = float(np.sum(np.bincount(frame[frame >= 0]) ** 2))
    count = config.full_attention_blocks
    attention = 4 * width * (count * full + (config.depth - count) * window)
    wide = width * config.merge_unit
    merger = patches / config.merge_unit * (wide**2 + wide * config.out_hidden_size)
    return 2 * patches * (config.patch_dim * width + config.depth * dense) + attention + 2 * merger


def dense_flops(config: TextConfig) -> float:
    """Forward pass of all layers of the language model for one token, attention scores apart."""
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * config.hidden_size * heads * config.head_dim
    mlp = 3 * config.hidden_size * config.intermediate_size
    return 2.0 * config.num_hidden_layers * (attention + mlp)


def attention_flops(config: TextConfig, queries: int, before: int) -> float:
    """Scores and their sums in all layers, of `queries` causal tokens after `before` others."""
    pairs = queries * before + queries * (queries + 1) / 2
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs


def head_flops(config: TextConfig) -> float:
    """The head for one token."""
    return 2.0 * config.hidden_size * config.vocab_size


def batch_flops(
    config: QwenVLConfig, prompts: PromptBatch, length_BG: np.ndarray
) -> tuple[float, float]:
    """One forward pass over prompts, each once, and their responses, without any padding.

    Args:
      config: the model's shape.
      prompts: B prompts, NumPy arrays.
      length_BG: [B, G] tokens of each response.

    Returns:
      FLOPs of the vision tower and of the language model.
    """
    text = 0.0
    for prompt, lengths in zip(
        np.asarray(prompts.length).tolist(), length_BG.tolist(), strict=True
    ):
        text += (prompt + sum(lengths)) * dense_flops(config.text)
        text += attention_flops(config.text, prompt, 0) + sum(lengths) * head_flops(config.text)
        text += sum(attention_flops(config.text, n, prompt) for n in lengths)
    frames = np.asarray(prompts.vision.frame)
    return sum(windows_flops(config.vision, frame) for frame in frames), text


def group_flops(config: QwenVLConfig, shape: GroupShape, head: bool = True) -> float:
    """One forward pass over a prompt and its group, the prompt once.

    Sampling the group needs as many, for each token is run once; an update needs three times that.
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
    """All decode steps of a group: every sampled token through the layers and the head."""
    text, tokens = config.text, shape.group * shape.response
    attention = shape.group * attention_flops(text, shape.response, shape.prompt)
    return tokens * (dense_flops(text) + head_flops(text)) + attention


def step_flops(config: QwenVLConfig, shape: GroupShape, passes: int, shared: bool) -> float:
    """A whole GRPO step for one prompt: rollout, `passes` of log-probabilities, and update.

    Args:
      config: the model's shape.
      shape: the prompt and its group.
      passes: forward passes for old and reference log-probabilities.
      shared: the prompt once a group; else once a sample, everywhere.
    """
    whole = (
        group_flops(config, shape) if shared else shape.group * group_flops(config, shape.alone())
    )
    return (1 + passes + 3) * whole


def program_flops(function: Callable, *args: Any) -> float:
    """Matrix-product FLOPs of a jittable function, loop lengths multiplied in.

    Of a branch the dearer side counts, of a `while_loop` one turn: neither is known beforehand.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def jaxpr_flops(
    jaxpr: core.Jaxpr, turns: float = 1.0, dear_share: float = 1.0, blocks: int | None = None
) -> float:
    """As `program_flops`, of a program that is traced already.

    Args:
      jaxpr: the program.
      turns: of each `while_loop`.
      dear_share: how often a branch takes its dearer side; else it takes the cheapest.
      blocks: of a row and head that splash attention computes, inside a call of it.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if not equation.outvars and not equation.effects:
            continue  # rematerialisation leaves such calls after, and the compiler drops them
        if name == "dot_general":
            total += _dot(equation)
            continue
        found = re.search(BLOCKS_RUN + r"(\d+)", str(equation.source_info.name_stack))
        run = int(found[1]) if found else blocks
        if name == "pallas_call":
            total += _kernel_calls(equation, run) * jaxpr_flops(params["jaxpr"])
            continue
        inner = [jaxpr_flops(i, turns, dear_share, run) for i in inner_jaxprs(params)]
        if name == "cond":
            total += max(inner) * dear_share + min(inner) * (1 - dear_share)
        elif name == "shard_map":  # it is written for one device's part
            axes = params.get("newly_manual_axes", params.get("manual_axes"))
            total += sum(inner) * math.prod(params["mesh"].shape[a] for a in axes)
        else:
            total += sum(inner) * {"scan": params.get("length"), "while": turns}.get(name, 1)
    return total


def inner_jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _kernel_calls(equation: core.JaxprEqn, blocks: int | None) -> float:
    """How often a Pallas kernel's body runs; splash leaves out blocks that its mask hides whole."""
    whole = float(np.prod(equation.params["grid_mapping"].grid, dtype=float))
    places = equation.invars[1].aval  # splash's map of blocks, where it has one
    if blocks is None or not np.issubdtype(places.dtype, np.integer):
        return whole
    return whole / float(np.prod(places.shape[-2:])) * blocks


def _dot(equation: core.JaxprEqn) -> float:
    (contract, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    summed = np.prod([left[axis] for axis in contract], dtype=float)
    return 2.0 * float(np.prod(equation.outvars[0].aval.shape, dtype=float)) * float(summed)
