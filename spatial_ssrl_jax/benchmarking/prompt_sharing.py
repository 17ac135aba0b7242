"""FLOPs of a GRPO step with and without sharing a group's prompt, at the tasks' prompt sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources.scenes import open_scenes
from spatial_ssrl_jax.perf.flops import GroupShape, step_flops
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import Grid
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.example import Example, Reject, Size, Task
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

LENGTHS = (50, 100, 200, 400, 800, 1600, 2048)
MIX = "mix"
_COCO, _DIODE = (480, 640), (768, 1024)  # height and width of the paper's images
_PASSES = 2  # old log-probabilities, which two updates a rollout need, and the reference's
_QUESTIONS = "scenes:20:448x448"  # small images of which only the question's words are used


@dataclass(frozen=True)
class TaskPrompt:
    """The prompt of one task.

    Attributes:
      weight: the task's weight in the paper's mixture.
      tokens: those of images included.
      grids: patch grids of its images.
    """

    weight: float
    tokens: int
    grids: tuple[Grid, ...]


def task_prompts(processor: Processor) -> dict[str, TaskPrompt]:
    """Each task's prompt for an image of 640x480, or of 1024x768 where it needs depth.

    `Processor.measure` computes the sizes; no image of these sizes is made.

    Raises:
      UserError: a task yields no example, whose words are needed.
    """
    found = {}
    for task in TASKS:
        sizes: list[Size] = task.sizes(_DIODE if task.needs_depth else _COCO, task.settings())
        question = f"{_example(task).question} {FORMAT_PROMPT}"
        extent = processor.measure(sizes, question)
        grids = tuple(processor.grid(*size) for size in sizes)
        found[task.name] = TaskPrompt(task.settings().weight, extent.tokens, grids)
    return found


def _example(task: Task) -> Example:
    source = open_scenes(_QUESTIONS, _QUESTIONS.partition(":")[2])
    for index in range(len(source)):
        try:
            return task.make(source[index], np.random.default_rng(index), task.settings())
        except Reject:
            continue
    raise UserError(f"{_QUESTIONS} gave no {task.name} example, so its words are not known.")


def sharing_curve(
    config: QwenVLConfig,
    prompts: dict[str, TaskPrompt],
    group: int,
    lengths: Sequence[int] = LENGTHS,
) -> dict[str, dict[int, dict[str, float]]]:
    """FLOPs a prompt of a whole GRPO step, with the prompt once a group and once a sample.

    A step is the rollout, one pass each for old and reference log-probabilities, and an update of
    three passes, vision tower and head included (see `step_flops`).

    Args:
      config: the model's shape.
      prompts: by task.
      group: samples a prompt.
      lengths: response tokens of every sample.

    Returns:
      By task and then response length, `shared` and `per_sample` FLOPs and their `ratio`; under
      `mix` the mean over tasks by their weights, and the ratio of the means.
    """
    curve: dict[str, dict[int, dict[str, float]]] = {name: {} for name in (*prompts, MIX)}
    weights = np.array([prompt.weight for prompt in prompts.values()])
    for length in lengths:
        costs = []
        for name, prompt in prompts.items():
            shape = GroupShape(prompt.tokens, prompt.grids, group, length)
            costs.append([step_flops(config, shape, _PASSES, shared) for shared in (True, False)])
            curve[name][length] = _point(*costs[-1])
        curve[MIX][length] = _point(*(weights @ np.array(costs) / weights.sum()))
    return curve


def _point(shared: float, per_sample: float) -> dict[str, float]:
    return {
        "shared": float(shared),
        "per_sample": float(per_sample),
        "ratio": float(per_sample / shared),
    }


def sharing_report(config: QwenVLConfig, processor: Processor, group: int) -> dict[str, Any]:
    """`sharing_curve` at the tasks' real prompts, with their weights and sizes.

    Raises:
      UserError: a group below 1.
    """
    if group < 1:
        raise UserError(f"--group={group} must be at least 1.")
    prompts = task_prompts(processor)
    total = sum(prompt.weight for prompt in prompts.values())
    return {
        "group": group,
        "prompts": {
            name: {
                "weight": prompt.weight / total,
                "tokens": prompt.tokens,
                "patches": int(sum(np.prod(grid) for grid in prompt.grids)),
                "images": len(prompt.grids),
            }
            for name, prompt in prompts.items()
        },
        "flops": sharing_curve(config, prompts, group),
    }


def sharing_lines(report: dict[str, Any]) -> list[str]:
    """The report as a table: FLOPs in units of 10^12, a column a response length."""
    curve = report["flops"]
    head = f"{'task':<10}{'weight':>6}{'tokens':>8}{'patches':>9}  {'TFLOPs a prompt':<16}"
    lines = [head + "".join(f"{length:>9}" for length in curve[MIX])]
    for name, points in curve.items():
        rows = {
            "group-shared": [f"{p['shared'] / 1e12:>9.1f}" for p in points.values()],
            "per sample": [f"{p['per_sample'] / 1e12:>9.1f}" for p in points.values()],
            "ratio": [f"{p['ratio']:>9.2f}" for p in points.values()],
        }
        lead = f"{name:<10}"
        if prompt := report["prompts"].get(name):
            lead += f"{prompt['weight']:>6.0%}{prompt['tokens']:>8}{prompt['patches']:>9}"
        for label, values in rows.items():
            lines.append(f"{lead:<33}  {label:<16}{''.join(values)}")
            lead = ""
    return lines
