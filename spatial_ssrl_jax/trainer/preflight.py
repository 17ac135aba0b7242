"""Checks a run before it starts, without writing: its sizes, and problems that would stop it."""

import shutil
import statistics
from contextlib import closing
from dataclasses import replace
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np
from etils import epath

from spatial_ssrl_jax.common.lock import check_unlocked
from spatial_ssrl_jax.common.paths import check_bucket, in_bucket, list_tree, user_path
from spatial_ssrl_jax.common.text import byte_size
from spatial_ssrl_jax.config.schema import Config, GrpoSettings
from spatial_ssrl_jax.data.batching import prompt_sizes
from spatial_ssrl_jax.data.depth_direction import depth_warnings
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.data.task_sources import source_shares, task_sources, trained_tasks
from spatial_ssrl_jax.eval.heldout_items import heldout_items
from spatial_ssrl_jax.monitoring.metrics import read_metrics
from spatial_ssrl_jax.parallel.sharding import shard_bytes
from spatial_ssrl_jax.perf.device_specs import device_memory_bytes
from spatial_ssrl_jax.rl.bucketing import Buckets
from spatial_ssrl_jax.rl.placement import abstract_stage_state, cache_bytes
from spatial_ssrl_jax.rl.row_shapes import row_shapes
from spatial_ssrl_jax.rl.sft import encode_responses, pack_step
from spatial_ssrl_jax.rl.stages import GrpoStage, SftStage, stages
from spatial_ssrl_jax.rl.train_step import TrainState
from spatial_ssrl_jax.trainer.bad_records import check_bad_fraction
from spatial_ssrl_jax.trainer.best_checkpoint import best_metric
from spatial_ssrl_jax.trainer.context import (
    RunComponents,
    heldout_datasets,
    open_components,
    pipeline,
)
from spatial_ssrl_jax.trainer.run_inputs import RunInputs, left_out
from spatial_ssrl_jax.trainer.workdir import check_workdir

_EXAMPLES = 32  # of SFT that each process makes
_RECENT = 50  # steps whose median is the time of a step


class Devices(TypedDict):
    """The run's devices; bytes of one, None where they are not known."""

    kind: str
    count: int
    processes: int
    memory_bytes: int | None


class Records(TypedDict):
    """The source, how many of its records train and are held out, and what each task draws from.

    `shares` is task -> SPEC -> fraction of the task's examples.
    """

    spec: str
    train: int
    heldout: int
    shares: dict[str, dict[str, float]]


class StageReport(TypedDict):
    """A stage's steps, the tokens and bytes of one, and the bytes of its state.

    SFT has `response_tokens`, GRPO `response_tokens_at_most`. `bucket` is [tokens, patches] of the
    first prompts; `seconds_a_step` is None before the run has steps.
    """

    steps: int
    steps_left: int
    prompts: int
    prompt_tokens: int
    response_tokens: NotRequired[int]
    response_tokens_at_most: NotRequired[int]
    measured_prompts: int
    bucket: list[int]
    batch_bytes: int
    padding_share: float
    trained: int
    frozen: int
    memory_bytes_a_device: dict[str, int]
    checkpoint_bytes: int
    frozen_bytes: int
    seconds_a_step: float | None


class Disk(TypedDict):
    """Bytes of the run's checkpoints, of those present, and free; None in a bucket."""

    checkpoints_bytes: int
    there_bytes: int
    free_bytes: int | None


class PreflightReport(TypedDict):
    """What `--check --json` prints."""

    workdir: str
    steps_done: int
    devices: Devices
    model: str
    source: Records
    stages: dict[str, StageReport]
    disk: Disk
    seconds_left: float | None
    notes: list[str]
    problems: list[str]


def preflight(config: Config, workdir: epath.PathLike, overwrite: bool = False) -> PreflightReport:
    """Opens everything as `train` does, and measures the first prompts of each stage.

    Args:
      config: the run.
      workdir: its folder; nothing is changed.
      overwrite: as for `train`.

    Returns:
      The run's components, stages, bytes and seconds, and `problems`: sentences that say why it
      would not complete; empty when there are none.

    Raises:
      UserError: the run could not start.
    """
    workdir = user_path(workdir)
    check_bucket(workdir)
    components = open_components(config)
    inputs = RunInputs.of(config, components.model, components.source)
    resumes = check_workdir(config, workdir, overwrite, inputs)
    check_unlocked(workdir)
    done = _steps_done(workdir) if resumes else 0
    notes = left_out(config, components.source)
    notes += depth_warnings(components.source, trained_tasks(components.tasks))
    heldout_items(heldout_datasets(components), 1, components.trained, notes.append)
    found: dict[str, StageReport] = {}
    for stage in stages(config):
        if left := stage.steps_left(done):
            seconds = _seconds(workdir, stage.name) if resumes else None
            found[stage.name] = _stage_report(components, stage, left, seconds, notes)
    disk = _disk(config, workdir, found)
    limit = device_memory_bytes()
    return {
        "workdir": str(workdir),
        "steps_done": done,
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "memory_bytes": limit,
        },
        "model": config.model.path,
        "source": {
            "spec": components.source.spec,
            "train": len(components.split.train),
            "heldout": len(components.split.heldout),
            "shares": _shares(components),
        },
        "stages": found,
        "disk": disk,
        "seconds_left": _seconds_left(found),
        "notes": notes,
        "problems": _problems(found, disk, limit),
    }


def _shares(components: RunComponents) -> dict[str, dict[str, float]]:
    source, pool, tasks = components.source, components.split.train, components.tasks
    return {
        task.name: source_shares(task_sources(source, pool, task, tasks[task]))
        for task in trained_tasks(tasks)
    }


def _stage_report(
    components: RunComponents,
    stage: SftStage | GrpoStage,
    left: int,
    seconds: float | None,
    notes: list[str],
) -> StageReport:
    """One stage's sizes, from its first prompts and the model's shapes; appends to `notes`."""
    settings, batch = stage.settings, _first_prompts(components, stage)
    skips = [skip for item in batch.items for skip in item.skipped]
    bad = sum(skip.bad for skip in skips)
    spec, tried = components.source.spec, bad + len(batch.items)
    check_bad_fraction(components.config, spec, bad, tried)
    if skips:
        seen, reason = len(batch.items) + len(skips), skips[0].reason
        notes.append(f"{len(skips)} of {seen} records gave no prompt (the first: {reason})")
    responses = 0
    sizes = prompt_sizes(batch.prompts)
    prompts, scale = int(sizes[:, 0].sum()), settings.prompts / len(batch.items)
    largest = Buckets.of(components.config).shape(*sizes.max(axis=0).tolist())
    padding = 1 - prompts / (len(batch.items) * largest.tokens)
    if isinstance(stage, SftStage):
        tokens = encode_responses(
            batch.items, components.processor, components.config.rollout.max_new_tokens
        )
        responses = sum(map(len, tokens))
        packed = pack_step(
            batch,
            tokens,
            row_shapes(components.config, stage, components.compute.attention),
            settings.micro_batch_rows,
            components.model.config,
        )
        padding = 1 - (prompts + responses) / packed.padded_tokens
    state = abstract_stage_state(
        components.config,
        components.model.config,
        components.layout,
        settings,
        stage.optimizer(components.config),
    )
    memory = _memory(components, stage, state)
    report: StageReport = {
        "steps": settings.steps,
        "steps_left": left,
        "prompts": settings.prompts,
        "prompt_tokens": round(prompts * scale),
        "measured_prompts": len(batch.items),
        "bucket": [largest.tokens, largest.patches],
        "batch_bytes": round(sum(p.nbytes for p in batch.prompts) * scale / jax.process_count()),
        "padding_share": round(padding, 3),
        "trained": _count(state.trained),
        "frozen": _count(state.frozen),
        "memory_bytes_a_device": memory | {"sum": _peak(memory, components.config.optim.offload)},
        "checkpoint_bytes": _total_bytes(replace(state, frozen={})),
        "frozen_bytes": _total_bytes(state.frozen),
        "seconds_a_step": seconds,
    }
    if isinstance(stage, SftStage):
        report["response_tokens"] = round(responses * scale)
    else:
        limit = components.config.rollout.max_new_tokens
        report["response_tokens_at_most"] = settings.prompts * stage.settings.group_size * limit
    return report


def _first_prompts(components: RunComponents, stage: SftStage | GrpoStage) -> Batch:
    """Some of a stage's first prompts, with pixels, from the pipeline of training.

    A whole batch at the paper's size can take minutes.
    """
    settings = replace(
        stage.settings, prompts=min(stage.update_prompts, _EXAMPLES * jax.process_count())
    )
    if isinstance(settings, GrpoSettings):
        settings = replace(settings, minibatches_per_rollout=1)
    small = replace(stage, settings=settings)
    with closing(pipeline(components, small, start=0)) as stream:
        return next(stream)


def _memory(
    components: RunComponents, stage: SftStage | GrpoStage, state: TrainState
) -> dict[str, int]:
    """Bytes of each device by use, at the largest buckets, without activations."""
    config = components.config
    size = np.dtype(config.model.dtype).itemsize
    prompt, limit = max(config.data.prompt_buckets), config.rollout.max_new_tokens
    tokens = config.eval.batch_prompts * (prompt + (config.eval.samples + 1) * limit)
    reference = 0
    if isinstance(stage, GrpoStage):
        group = stage.settings.group_size * limit
        tokens = max(tokens, components.rollout_prompts * (prompt + group))
        if stage.settings.copies_reference:
            reference = shard_bytes(state.trained, size)
    return {
        "weights": shard_bytes(state.trained) + shard_bytes(state.frozen),
        "optimizer": shard_bytes(state.opt_state),
        "reference": reference,
        "rollout_copy": shard_bytes(
            components.rollout_layout.abstract_params(components.model.config, part="text/"), size
        ),
        "caches": cache_bytes(config, components.model.config, components.rollout_layout, tokens),
        "gradients": 2 * shard_bytes(state.trained),  # the sum and the micro-batch's
    }


def _peak(memory: dict[str, int], offload: bool) -> int:
    """Peak bytes: sampling's memory is freed before the update allocates its own."""
    sampling, gradients = memory["rollout_copy"] + memory["caches"], memory["gradients"]
    resident = memory["optimizer"] + memory["reference"]
    if offload:
        updating = memory["optimizer"] + gradients // 2
        return memory["weights"] + max(sampling, gradients, updating)
    return memory["weights"] + resident + max(sampling, gradients)


def _total_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes, over all devices."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _steps_done(workdir: epath.Path) -> int:
    """The newest checkpoint's step."""
    names = [p.name for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(map(int, names), default=0)


def _seconds(workdir: epath.Path, stage: str) -> float | None:
    """The median time of a stage's newest steps in this folder; None where there are none."""
    seconds = [
        row["perf/step_seconds"]
        for row in read_metrics(workdir)
        if row["stage"] == stage and row.get("perf/step_seconds") is not None
    ]
    return round(statistics.median(seconds[-_RECENT:]), 3) if seconds else None


def _seconds_left(reports: dict[str, StageReport]) -> float | None:
    """The time of the remaining steps; None where a stage has no measured step."""
    total = 0.0
    for stage in reports.values():
        if stage["seconds_a_step"] is None:
            return None
        total += stage["seconds_a_step"] * stage["steps_left"]
    return total


def _disk(config: Config, workdir: epath.Path, reports: dict[str, StageReport]) -> Disk:
    free = None
    if not in_bucket(workdir):
        nearest = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
        free = shutil.disk_usage(nearest).free
    largest = max((s["checkpoint_bytes"] for s in reports.values()), default=0)
    # An old one is removed after a new one is complete; the best and the last of SFT are kept.
    measured = max(config.eval.every, config.eval.benchmark_every) > 0
    best = measured and best_metric(config) is not None
    count = config.checkpoint.keep + 1 + best + bool(config.sft.steps)
    there = sum(size for size, _ in list_tree(workdir / "checkpoints").values())
    return {
        "checkpoints_bytes": largest * count + sum(s["frozen_bytes"] for s in reports.values()),
        "there_bytes": there,
        "free_bytes": free,
    }


def _problems(reports: dict[str, StageReport], disk: Disk, limit: int | None) -> list[str]:
    """Why the run would not complete: too little memory or disk."""
    found = []
    for name, stage in reports.items():
        needs = stage["memory_bytes_a_device"]["sum"]
        if limit is not None and needs > limit:
            found.append(
                f"{name} needs {byte_size(needs)} a device without activations, and a device has "
                f"{byte_size(limit)}: use more devices (mesh.fsdp), LoRA, a smaller "
                "rollout.batch_prompts or shorter limits."
            )
    needs, free = disk["checkpoints_bytes"] - disk["there_bytes"], disk["free_bytes"]
    if free is not None and needs > free:
        found.append(
            f"the checkpoints need {byte_size(needs)} more and only {byte_size(free)} is "
            "free: free space, choose another --workdir, or lower checkpoint.keep."
        )
    return found
