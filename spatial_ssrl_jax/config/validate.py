"""Which settings go together: what contradicts itself is refused before anything is built."""

import dataclasses
import re
import typing
from typing import Any

from spatial_ssrl_jax.common.bounds import invalid_values
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import (
    PATCHES_A_TOKEN,
    Config,
    DataSettings,
    GrpoSettings,
    StageSettings,
)
from spatial_ssrl_jax.qwen_vl.kernels import DECODE_KERNELS, KERNELS
from spatial_ssrl_jax.qwen_vl.lora import known_targets
from spatial_ssrl_jax.qwen_vl.param_tree import PARTS
from spatial_ssrl_jax.tasks.example import Task

_ROW_SIZES = 3  # of a stage at most


def check_settings(config: Config) -> None:
    """Refuses settings that are out of range or contradict one another.

    Raises:
      UserError: names the setting and what it must be.
    """
    _check_tasks(config)
    if problem := next(invalid_values(config), None):
        raise UserError(f"{problem}.")
    for name in config.reward.task_weights:
        _check_choice("reward.task_weights", name, tuple(config.tasks))
    for name, known in _choices(config).items():
        _check_choice(name, _value(config, name), known)
    _check_policy_loss(config.grpo)
    if config.data.min_pixels > config.data.max_pixels:
        raise UserError(
            f"data.min_pixels={config.data.min_pixels} must be at most "
            f"data.max_pixels={config.data.max_pixels}."
        )
    _check_batches(config)
    _check_buckets(config.data)
    for name, stage in (("sft", config.sft), ("grpo", config.grpo)):
        _check_rows(name, stage)
        _check_trained(name, stage)
    _check_stages(config)
    _check_benchmark(config)


def _check_tasks(config: Config) -> None:
    """Refuses what is not the settings of each task by its name, and extra tasks that are none."""
    tasks: Any = config.tasks  # a config file may give anything
    if not isinstance(tasks, dict):
        raise UserError(f"tasks must be a dict of settings, not {type(tasks).__name__}.")
    for task in config.extra_tasks:
        if not isinstance(task, Task):
            raise UserError(f"extra_tasks must hold Tasks, not {type(task).__name__}.")
    names = [task.name for task in config.all_tasks]
    for task in config.extra_tasks:
        if names.count(task.name) > 1 or not re.fullmatch(r"[a-z]\w*", task.name):
            raise UserError(
                f"extra_tasks has a task named {task.name!r}: give each a name of its own, in "
                "lower-case letters, digits and _."
            )
    known = {task.name: task.settings for task in config.all_tasks}
    for name, settings in tasks.items():
        _check_choice("tasks", name, tuple(known))
        kind = known[name]
        if not isinstance(settings, kind):
            raise UserError(
                f"tasks.{name} must be a {kind.__name__}, not {type(settings).__name__}."
            )
        for field in dataclasses.fields(settings):
            _check_keys(f"tasks.{name}.{field.name}", getattr(settings, field.name), kind())


def _check_keys(name: str, value: Any, defaults: Any) -> None:
    """Refuses keys of a setting that is a dict, such as weights of kinds, without a default."""
    known = getattr(defaults, name.rpartition(".")[2], None)
    if isinstance(value, dict) and isinstance(known, dict):
        for key in value:
            _check_choice(name, key, tuple(known))


def _value(config: Config, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def _choices(config: Config) -> dict[str, tuple[str, ...]]:
    """What each setting with a fixed list of values may be: its `Literal`, or the kernels."""
    found = {
        "model.attention": ("auto", *KERNELS),
        "rollout.attention": ("auto", *DECODE_KERNELS),
    }
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if not dataclasses.is_dataclass(value):
            continue
        for key, hint in typing.get_type_hints(type(value)).items():
            if typing.get_origin(hint) is typing.Literal:
                found[f"{section.name}.{key}"] = typing.get_args(hint)
    return found


def _check_benchmark(config: Config) -> None:
    """Refuses a benchmark without files, and settings of one that is not evaluated."""
    found, best = config.eval, config.checkpoint.best
    if found.benchmark and not found.benchmark_data:
        raise UserError(
            f"eval.benchmark={found.benchmark} needs its files: set eval.benchmark_data."
        )
    if not found.benchmark and (found.benchmark_data or found.benchmark_every):
        raise UserError(
            "eval.benchmark_data and eval.benchmark_every do nothing without a benchmark: set "
            "eval.benchmark."
        )
    if not found.benchmark and best == "benchmark":
        raise UserError(
            "checkpoint.best=benchmark needs one that is evaluated: set eval.benchmark, or choose "
            "heldout."
        )


def _check_batches(config: Config) -> None:
    """Refuses sizes that do not divide one another."""
    grpo, rollout = config.grpo, config.rollout
    minibatches = grpo.minibatches_per_rollout
    _check_divides("grpo.minibatches_per_rollout", minibatches, "grpo.prompts", grpo.prompts)
    if rollout.batch_prompts:
        _check_divides("rollout.batch_prompts", rollout.batch_prompts, "grpo.prompts", grpo.prompts)
    for name in ("kv_block", "max_new_tokens"):
        total = getattr(rollout, name)
        _check_divides("rollout.check_every", rollout.check_every, f"rollout.{name}", total)


def _check_policy_loss(grpo: GrpoSettings) -> None:
    """Refuses settings of GRPO's loss that have no effect, or would count something twice."""
    if 0 < grpo.dual_clip <= 1:
        raise UserError(f"grpo.dual_clip={grpo.dual_clip} must be above 1, or 0 to turn it off.")
    if grpo.policy_loss == "cispo" and grpo.dual_clip:
        raise UserError(
            f"grpo.dual_clip={grpo.dual_clip} does nothing with grpo.policy_loss=cispo, whose "
            "weights are clipped on both sides: set grpo.dual_clip=0."
        )
    if grpo.advantage == "rloo" and grpo.scale_rewards:
        raise UserError(
            "grpo.advantage=rloo is not divided by a standard deviation: set "
            "grpo.scale_rewards=False."
        )
    if grpo.kl_schedule != "constant" and not grpo.kl_coef:
        raise UserError(
            f"grpo.kl_schedule={grpo.kl_schedule} does nothing with grpo.kl_coef=0: set "
            "grpo.kl_coef above 0, or the schedule to constant."
        )
    if grpo.importance_level == "sequence" and grpo.importance_correction == "none":
        raise UserError(
            "grpo.importance_level=sequence does nothing with grpo.importance_correction=none: "
            "choose truncate or mask."
        )
    if grpo.importance_correction != "none" and grpo.old_logprobs == "sampler":
        raise UserError(
            f"grpo.importance_correction={grpo.importance_correction} would count the sampler "
            "twice, as grpo.old_logprobs=sampler has it in the ratio already: set one of them to "
            "none or recomputed."
        )
    if not grpo.filter_groups and (grpo.filter_low, grpo.filter_high) != (0, 1):
        raise UserError(
            "grpo.filter_low and grpo.filter_high do nothing without grpo.filter_groups: set it "
            "to True."
        )
    if grpo.filter_low >= grpo.filter_high:
        raise UserError(
            f"grpo.filter_low={grpo.filter_low} must be below grpo.filter_high={grpo.filter_high}."
        )


def _check_stages(config: Config) -> None:
    """Refuses runs in which nothing would be learned, or whose stages contradict each other."""
    grpo, sft = config.grpo, config.sft
    if grpo.steps and grpo.group_size < 2:
        raise UserError(
            f"grpo.group_size={grpo.group_size} must be at least 2: a group of one has no "
            "advantage, and with grpo.scale_rewards no standard deviation."
        )
    if not any(settings.weight > 0 for settings in config.tasks.values()):
        raise UserError("every task has weight 0: give at least one tasks.NAME.weight above 0.")
    if sft.steps == 0 and grpo.steps == 0:
        raise UserError(
            "sft.steps and grpo.steps are both 0: set one above 0, or there is nothing to train."
        )
    if grpo.init_from and sft.steps:
        raise UserError(
            "grpo.init_from takes the place of what sft trains: set sft.steps=0, or leave "
            "grpo.init_from empty."
        )


def _check_buckets(data: DataSettings) -> None:
    """Refuses buckets of which a number is missing."""
    if data.patch_buckets and len(data.patch_buckets) != len(data.prompt_buckets):
        raise UserError(
            f"data.prompt_buckets={data.prompt_buckets} and "
            f"data.patch_buckets={data.patch_buckets} must have equally many numbers, one each for "
            "every bucket; or leave out data.patch_buckets."
        )
    _check_patches("data.patch_buckets", data.patch_buckets)


def _check_patches(name: str, counts: tuple[int, ...]) -> None:
    """Refuses patches that are no whole tokens."""
    if any(count % PATCHES_A_TOKEN for count in counts):
        raise UserError(
            f"{name}={counts} must be multiples of {PATCHES_A_TOKEN}, the patches of a token."
        )


def _check_rows(name: str, stage: StageSettings) -> None:
    """Refuses sizes of rows of which a number is missing."""
    sizes = {len(stage.row_tokens), len(stage.row_patches), len(stage.row_responses)}
    if len(sizes) > 1:
        raise UserError(
            f"{name}.row_tokens={stage.row_tokens}, {name}.row_patches={stage.row_patches} and "
            f"{name}.row_responses={stage.row_responses} must have equally many numbers, one each "
            "for every size of rows."
        )
    _check_patches(f"{name}.row_patches", stage.row_patches)
    if len(stage.row_tokens) > _ROW_SIZES:
        raise UserError(
            f"{name}.row_tokens={stage.row_tokens} has more than {_ROW_SIZES} sizes of rows, for "
            "each of which programs are compiled: leave some out."
        )
    for tokens, responses in zip(stage.row_tokens, stage.row_responses, strict=True):
        if responses > tokens:
            raise UserError(
                f"{name}.row_responses={responses} is above {name}.row_tokens={tokens} of the same "
                "size of rows: lower it, as a row's tokens include its responses."
            )


def _check_trained(name: str, stage: StageSettings) -> None:
    """Refuses choices of weights that leave nothing to train, or that have no effect."""
    lora = stage.lora
    for part in stage.freeze:
        _check_choice(f"{name}.freeze", part, PARTS)
    for target in lora.targets:
        _check_choice(f"{name}.lora.targets", target, known_targets())
    if set(stage.freeze) == set(PARTS):
        raise UserError(f"{name}.freeze holds every part: leave one that trains.")
    if lora.rank and not lora.targets:
        raise UserError(f"{name}.lora.targets is empty: name a part such as language.")
    if lora.rank and stage.freeze:
        raise UserError(
            f"{name}.freeze does nothing with {name}.lora.rank={lora.rank}, which trains adapters "
            f"alone: choose {name}.lora.targets instead."
        )
    scale = stage.vision_learning_rate_scale
    if scale != 1 and not stage.trains("vision"):
        raise UserError(
            f"{name}.vision_learning_rate_scale={scale} must be 1 where the vision tower does not "
            "train: train it, or leave the setting out."
        )


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name}={value} is unknown: choose one of {', '.join(known)}.")


def _check_divides(small: str, divisor: int, large: str, total: int) -> None:
    if divisor < 1 or total % divisor:
        raise UserError(f"{small}={divisor} must divide {large}={total}.")
