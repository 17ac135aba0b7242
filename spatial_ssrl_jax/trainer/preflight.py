"""Looks a run over before it starts, writing nothing: what would go wrong, and how large it is."""

import shutil
import statistics
from contextlib import closing
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from spatial_ssrl_jax.common.paths import check_bucket, in_bucket, list_tree, user_path
from spatial_ssrl_jax.config.schema import StageSettings, Config, GrpoSettings, SftSettings
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.eval.heldout import heldout_items
from spatial_ssrl_jax.monitoring.metrics import read_metrics
from spatial_ssrl_jax.perf.device_specs import device_memory_bytes
from spatial_ssrl_jax.rl.optimizer import make_optimizer
from spatial_ssrl_jax.rl.placement import abstract_stage_state
from spatial_ssrl_jax.rl.sft import encode_responses, pack_step
from spatial_ssrl_jax.rl.train_step import TrainState
from spatial_ssrl_jax.rollout.cache import kv_token_bytes
from spatial_ssrl_jax.trainer.best_checkpoint import best_metric
from spatial_ssrl_jax.trainer.context import (
    RunComponents,
    check_bad_fraction,
    heldout_datasets,
    open_components,
    pipeline,
)
from spatial_ssrl_jax.trainer.workdir import check_workdir

_EXAMPLES = 32  # of the cold start that each process makes
_RECENT = 50  # steps whose median says how long one takes


def preflight(config: Config, workdir: epath.PathLike, overwrite: bool = False) -> dict[str, Any]:
    """Opens everything as `train` does, makes the first prompts of each stage, and measures.

    Args:
      config: the run.
      workdir: where it would be left; it stays as it is.
      overwrite: as for `train`.

    Returns:
      Plain JSON types: what the run is made of, its stages, bytes, seconds, and `problems`:
      sentences that say why it would not run through; empty when it would.

    Raises:
      UserError: it would not begin.
    """
    workdir = user_path(workdir)
    check_bucket(workdir)
    parts = open_components(config)
    goes_on = check_workdir(config, workdir, overwrite)
    done = _steps_done(workdir) if goes_on else 0
    notes: list[str] = []
    heldout_items(heldout_datasets(parts), 1, notes.append)
    if not parts.split.heldout:
        notes.append("no image is held out, so there are no held-out metrics")
    stages, first = {}, 0
    for name, settings in (("sft", config.sft), ("grpo", config.grpo)):
        left = min(max(first + settings.steps - done, 0), settings.steps)
        first += settings.steps
        if left:
            stages[name] = _stage(parts, settings, left, notes)
            stages[name]["seconds_a_step"] = _seconds(workdir, name) if goes_on else None
    disk = _disk(config, workdir, stages)
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
            "spec": parts.source.spec,
            "train": len(parts.split.train),
            "heldout": len(parts.split.heldout),
        },
        "stages": stages,
        "disk": disk,
        "seconds_left": _seconds_left(stages),
        "notes": notes,
        "problems": _problems(stages, disk, limit),
    }


def _stage(
    parts: RunComponents, settings: StageSettings, left: int, notes: list[str]
) -> dict[str, Any]:
    """One stage's size, from its first prompts and from the model's shapes."""
    batch = _first_prompts(parts, settings)
    skips = [skip for item in batch.items for skip in item.skipped]
    bad = sum(skip.bad for skip in skips)
    check_bad_fraction(parts, bad, bad + len(batch.items))
    if skips:
        seen, reason = len(batch.items) + len(skips), skips[0].reason
        notes.append(f"{len(skips)} of {seen} records gave no prompt (the first: {reason})")
    prompts, scale = int(batch.prompts.length.sum()), settings.prompts / len(batch.items)
    bucket, windows = batch.prompts.ids.shape[1], batch.prompts.vision.frame.shape[1]
    padding = 1 - prompts / (len(batch.items) * bucket)
    if isinstance(settings, SftSettings):
        tokens = encode_responses(batch.items, parts.processor, parts.config.rollout.max_new_tokens)
        count = sum(map(len, tokens))
        packed = pack_step(batch, tokens, settings, parts.model.config.vision)
        padding = 1 - (prompts + count) / packed.places
        responses = {"response_tokens": round(count * scale)}
    else:
        most = settings.prompts * settings.group_size * parts.config.rollout.max_new_tokens
        responses = {"response_tokens_at_most": most}
    optimizer = make_optimizer(parts.config.optim, settings, 1)
    state = abstract_stage_state(
        parts.config, parts.model.config, parts.layout, settings, optimizer
    )
    memory = _memory(parts, settings, state)
    return {
        "steps": settings.steps,
        "steps_left": left,
        "prompts": settings.prompts,
        "prompt_tokens": round(prompts * scale),
        **responses,
        "measured_prompts": len(batch.items),
        "bucket": [bucket, windows],
        "batch_bytes": round(_whole(batch.prompts) * scale / jax.process_count()),
        "padding_share": round(padding, 3),
        "trained": _count(state.trained),
        "frozen": _count(state.frozen),
        "memory_bytes_a_device": memory | {"sum": _most(memory, parts.config.optim.offload)},
        "checkpoint_bytes": _whole(replace(state, frozen={})),
        "frozen_bytes": _whole(state.frozen),
    }


def _first_prompts(parts: RunComponents, settings: StageSettings) -> Batch:
    """A stage's first micro-batch, by the pipeline that training reads, pixels and all.

    A whole batch at the paper's size can take tens of gigabytes and minutes.
    """
    name = "sft" if isinstance(settings, SftSettings) else "grpo"
    few = min(settings.prompts, _EXAMPLES * jax.process_count())
    small = replace(settings, prompts=settings.micro_batch_prompts if name == "grpo" else few)
    parts = replace(parts, config=replace(parts.config, **{name: small}))
    with closing(pipeline(parts, small, start=0)) as stream:
        return next(stream)


def _memory(parts: RunComponents, settings: StageSettings, state: TrainState) -> dict[str, int]:
    """Bytes of each device by what takes them, at the largest buckets; no activations."""
    config, text = parts.config, parts.model.config.text
    size = np.dtype(config.model.dtype).itemsize
    prompt, limit = max(config.data.prompt_buckets), config.rollout.max_new_tokens
    tokens = config.eval.batch_prompts * (prompt + config.eval.samples * limit)
    reference = 0
    if isinstance(settings, GrpoSettings):
        tokens = max(tokens, config.rollout.batch_prompts * (prompt + settings.group_size * limit))
        if settings.kl_coef and not settings.lora.rank:
            reference = _own(state.trained, size)
    return {
        "weights": _own(state.trained) + _own(state.frozen),
        "optimizer": _own(state.opt_state),
        "reference": reference,
        "rollout_copy": _own(
            parts.rollout_layout.abstract_params(parts.model.config, part="text/"), size
        ),
        "caches": tokens * kv_token_bytes(text, config.model.dtype) // _cache_parts(parts),
        "gradients": 2 * _own(state.trained),  # the sum and what is added to it
    }


def _cache_parts(parts: RunComponents) -> int:
    """Parts that the caches are cut into while sampling, by rows and by key/value heads."""
    rows, tensor = parts.rollout_layout.batch_shards, parts.config.rollout.tensor
    return rows if parts.model.config.text.num_key_value_heads % tensor else rows * tensor


def _most(memory: dict[str, int], offload: bool) -> int:
    """What is there at once: sampling's own part is freed before the update's comes."""
    sampling, gradients = memory["rollout_copy"] + memory["caches"], memory["gradients"]
    rests = memory["optimizer"] + memory["reference"]
    if offload:
        updating = memory["optimizer"] + gradients // 2
        return memory["weights"] + max(sampling, gradients, updating)
    return memory["weights"] + rests + max(sampling, gradients)


def _own(tree: Any, itemsize: int | None = None) -> int:
    """Bytes of one device's part of sharded shapes."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * (itemsize or x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
    )


def _whole(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _steps_done(workdir: epath.Path) -> int:
    """The newest checkpoint's step."""
    names = [p.name for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(map(int, names), default=0)


def _seconds(workdir: epath.Path, stage: str) -> float | None:
    """The median of the newest steps of a stage in this folder; None where there are none."""
    seconds = [
        row["perf/step_seconds"]
        for row in read_metrics(workdir)
        if row["stage"] == stage and row.get("perf/step_seconds") is not None
    ]
    return round(statistics.median(seconds[-_RECENT:]), 3) if seconds else None


def _seconds_left(stages: dict[str, dict]) -> float | None:
    seconds = [stage["seconds_a_step"] for stage in stages.values()]
    if None in seconds:
        return None
    return sum(s * stage["steps_left"] for s, stage in zip(seconds, stages.values(), strict=True))


def _disk(config: Config, workdir: epath.Path, stages: dict[str, dict]) -> dict[str, int | None]:
    """Bytes that the run's checkpoints come to, those there are, and those free beside them; None
    in a bucket, which has no end."""
    free = None
    if not in_bucket(workdir):
        place = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free
    largest = max((s["checkpoint_bytes"] for s in stages.values()), default=0)
    # A new one is complete before an old one goes; the best and the cold start's last one stay.
    measured = max(config.eval.every, config.eval.benchmark_every) > 0
    best = measured and best_metric(config) is not None
    count = config.checkpoint.keep + 1 + best + bool(config.sft.steps)
    there = sum(size for size, _ in list_tree(workdir / "checkpoints").values())
    return {
        "checkpoints_bytes": largest * count + sum(s["frozen_bytes"] for s in stages.values()),
        "there_bytes": there,
        "free_bytes": free,
    }


def _problems(stages: dict[str, dict], disk: dict[str, int | None], limit: int | None) -> list[str]:
    found = []
    for name, stage in stages.items():
        needs = stage["memory_bytes_a_device"]["sum"]
        if limit is not None and needs > limit:
            found.append(
                f"{name} needs {_size(needs)} a device before any activation, and a device has "
                f"{_size(limit)}: use more devices (mesh.fsdp), LoRA, a smaller rollout.batch_prompts or "
                "shorter limits."
            )
    needs, free = disk["checkpoints_bytes"] - disk["there_bytes"], disk["free_bytes"]
    if free is not None and needs > free:
        found.append(
            f"the checkpoints come to {_size(needs)} more and only {_size(free)} is "
            "free: free space, choose another --workdir, or lower checkpoint.keep."
        )
    return found


def print_report(report: dict[str, Any], console: Console) -> None:
    """Prints a report of `preflight` as a short list."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in _lines(report):
        table.add_row(name, text)
    console.print(table, soft_wrap=True)
    for note in report["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if not report["problems"]:
        console.print("it would run", highlight=False)


def _lines(report: dict[str, Any]):
    devices, source, disk = report["devices"], report["source"], report["disk"]
    has = devices["memory_bytes"]
    yield "model", report["model"]
    yield (
        "source",
        f"{source['spec']}: {source['train']:,} training, {source['heldout']:,} held out",
    )
    yield (
        "devices",
        f"{devices['count']} x {devices['kind']}, {devices['processes']} process(es), memory "
        + (f"{_size(has)} each" if has else "unknown"),
    )
    done = report["steps_done"]
    yield "folder", report["workdir"] + (f", resumes after step {done}" if done else "")
    for name, stage in report["stages"].items():
        yield from ((f"{name}: {what}", text) for what, text in _stage_lines(stage))
    yield (
        "checkpoints",
        f"{_size(disk['checkpoints_bytes'])} in all, {_size(disk['there_bytes'])} there"
        + ("" if disk["free_bytes"] is None else f", {_size(disk['free_bytes'])} free"),
    )
    left = report["seconds_left"]
    yield "time left", "unknown until some steps are done" if left is None else _time(left)


def _stage_lines(stage: dict[str, Any]):
    most = stage.get("response_tokens_at_most")
    response = f"at most {most:,}" if most else f"{stage['response_tokens']:,}"
    left = f", {stage['steps_left']:,} left" if stage["steps_left"] < stage["steps"] else ""
    tokens, windows = stage["bucket"]
    padding = f"{stage['padding_share']:.0%} padding"
    memory = dict(stage["memory_bytes_a_device"])
    whole = _size(memory.pop("sum"))
    parts = ", ".join(f"{n.replace('_', ' ')} {_size(b)}" for n, b in memory.items() if b)
    yield "steps", f"{stage['steps']:,} of {stage['prompts']:,} prompts{left}"
    yield "tokens a step", f"{stage['prompt_tokens']:,} of prompts, {response} of responses"
    yield (
        f"first {stage['measured_prompts']} prompts",
        f"bucket of {tokens:,} tokens and {windows:,} windows, {padding}",
    )
    yield "host memory", f"{_size(stage['batch_bytes'])} a batch in that bucket"
    yield "parameters", f"{stage['trained']:,} trained, {stage['frozen']:,} frozen"
    yield "memory a device", f"about {whole} without activations, an estimate: {parts}"
    yield "a checkpoint", _size(stage["checkpoint_bytes"])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
