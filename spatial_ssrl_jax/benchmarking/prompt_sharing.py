"""FLOPs of a GRPO step with and without sharing a group's prompt, at the tasks' prompt sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources.scenes import open_scenes
from spatial_ssrl_jax.data.stand_ins import own_source
from spatial_ssrl_jax.data.task_sources import task_sources, tasks_for, trained_tasks, unusable
from spatial_ssrl_jax.perf.flops import GroupShape, step_flops
from spatial_ssrl_jax.qwen_vl.config import QwenVLConfig
from spatial_ssrl_jax.qwen_vl.inputs import Grid
from spatial_ssrl_jax.tasks.example import Example, Reject, Task
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT

LENGTHS = (50, 100, 200, 400, 800, 1600, 2048)
MIX = "mix"
_PASSES = 1.5  # old log-probabilities of the second of two updates, and the reference's
_MEASURED = 9  # images of a source
_QUESTIONS = "scenes:20:448x448"  # small images of which only the question's words are used


@dataclass(frozen=True)
class TaskPrompt:
    """The prompts of one task that have images of one size.

    Attributes:
      weight: of these prompts in the mixture of tasks.
      tokens: those of images included.
      grids: patch grids of its images.
    """

    weight: float
    tokens: int
    grids: tuple[Grid, ...]


Prompts = dict[str, list[TaskPrompt]]  # by task


def task_prompts(config: Config, processor: Processor) -> Prompts:
    """Each trained task's prompts, for the image sizes of the config's source.

    Of a source that is here a few images are measured, by their headers; of another one the
    `stand_in`. `Processor.measure` computes the prompts' sizes.

    Raises:
      UserError: a task has no source or yields no example, or nothing is known of its sizes.
    """
    found: Prompts = {}
    source = own_source(config)
    tasks = tasks_for(source, config.task_settings)
    for task in trained_tasks(tasks):
        settings = tasks[task]
        parts = task_sources(source, range(len(source)), task, settings)
        if not parts:
            raise UserError(f"{unusable(source, task)}: give another source.")
        question = f"{_example(task).question} {FORMAT_PROMPT}"
        total, found[task.name] = sum(part.weight for part in parts), []
        for part in parts:
            chosen = part.indices[:: -(-len(part.indices) // _MEASURED)]
            weight = settings.weight * part.weight / total / len(chosen)
            for index in chosen:
                sizes = part.maker.sizes(index)
                grids = tuple(processor.grid(*size) for size in sizes)
                tokens = processor.measure(sizes, question).tokens
                found[task.name].append(TaskPrompt(weight, tokens, grids))
    return found


def _example(task: Task[Any]) -> Example:
    """An example of a small built-in scene, of which only the words are used."""
    source = open_scenes(_QUESTIONS, _QUESTIONS.partition(":")[2])
    for index in range(len(source)):
        try:
            return task.make(source[index], np.random.default_rng(index), task.settings())
        except Reject:
            continue
    raise UserError(f"{_QUESTIONS} gave no {task.name} example, so its words are not known.")


def sharing_curve(
    config: QwenVLConfig,
    prompts: Prompts,
    group: int,
    lengths: Sequence[int] = LENGTHS,
) -> dict[str, dict[int, dict[str, float]]]:
    """FLOPs a prompt of a whole GRPO step, with the prompt once a group and once a sample.

    A step is the rollout, a pass for reference log-probabilities, half of one for the old ones of
    the second of two updates, and updates of three, vision tower and head included; see
    `step_flops`.

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
    for length in lengths:
        for name, alike in (*prompts.items(), (MIX, [p for x in prompts.values() for p in x])):
            weights = np.array([prompt.weight for prompt in alike])
            shapes = [GroupShape(p.tokens, p.grids, group, length) for p in alike]
            costs = [
                [step_flops(config, shape, _PASSES, shared) for shared in (True, False)]
                for shape in shapes
            ]
            curve[name][length] = _point(*(weights @ np.array(costs) / weights.sum()))
    return curve


def _point(shared: float, per_sample: float) -> dict[str, float]:
    return {
        "shared": float(shared),
        "per_sample": float(per_sample),
        "ratio": float(per_sample / shared),
    }


def sharing_report(
    model: QwenVLConfig, config: Config, processor: Processor, group: int
) -> dict[str, Any]:
    """`sharing_curve` at the tasks' real prompts, with their weights and mean sizes.

    Args:
      model: the model's shape.
      config: its source and tasks are used.
      processor: measures prompts.
      group: samples a prompt.

    Raises:
      UserError: a group below 1.
    """
    if group < 1:
        raise UserError(f"--group={group} must be at least 1.")
    prompts = task_prompts(config, processor)
    total = sum(prompt.weight for alike in prompts.values() for prompt in alike)
    return {
        "group": group,
        "source": own_source(config).spec,
        "prompts": {name: _mean_prompt(alike, total) for name, alike in prompts.items()},
        "flops": sharing_curve(model, prompts, group),
    }


def _mean_prompt(alike: Sequence[TaskPrompt], total: float) -> dict[str, float]:
    weights = np.array([prompt.weight for prompt in alike])
    sizes = [(p.tokens, sum(int(np.prod(grid)) for grid in p.grids)) for p in alike]
    tokens, patches = weights @ np.array(sizes) / weights.sum()
    return {
        "weight": float(weights.sum() / total),
        "tokens": round(tokens),
        "patches": round(patches),
        "images": len(alike[0].grids),
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
