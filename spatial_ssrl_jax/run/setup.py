"""Everything a run holds while it goes on, and opening it: what cannot work is refused here."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import jax
import numpy as np
from etils import epath

from spatial_ssrl_jax.config import Config, GrpoSettings, SftSettings, to_dict
from spatial_ssrl_jax.data.items import check_fits, item_dataset
from spatial_ssrl_jax.data.pipeline import Collate, Split, batches, split_records
from spatial_ssrl_jax.data.prompts import Extent, Processor
from spatial_ssrl_jax.data.sources import AnySource, open_source
from spatial_ssrl_jax.errors import UserError
from spatial_ssrl_jax.eval.benchmarks import Benchmark
from spatial_ssrl_jax.eval.pretext import PretextEval, Table, heldout_items, task_datasets
from spatial_ssrl_jax.folders import (
    check_bucket,
    check_folder,
    claim_folder,
    in_bucket,
    whole_folder,
    write_whole,
)
from spatial_ssrl_jax.qwen2_5_vl.config import Qwen2_5_VLConfig
from spatial_ssrl_jax.qwen2_5_vl.kernels import choose_kernel, choose_step_kernel
from spatial_ssrl_jax.qwen2_5_vl.model import Compute
from spatial_ssrl_jax.rollout.engine import Engine
from spatial_ssrl_jax.run import models
from spatial_ssrl_jax.run.benchmark import BenchmarkEval, how_to_ask, open_questions
from spatial_ssrl_jax.run.best import Best
from spatial_ssrl_jax.run.checkpoint import MODEL, Checkpoints, pass_over_damaged
from spatial_ssrl_jax.run.mesh import (
    Layout,
    gather_rows,
    is_writer,
    make_mesh,
    wait_for_all,
)
from spatial_ssrl_jax.run.metrics import MetricsWriter
from spatial_ssrl_jax.run.monitor import Compilations
from spatial_ssrl_jax.run.preemption import Preemption
from spatial_ssrl_jax.run.progress import Progress
from spatial_ssrl_jax.run.start import check_start
from spatial_ssrl_jax.run.tracker import Tracker, check_tracker

# Changing these between two starts of one run changes neither what was trained before nor, but for
# rounding, what is trained from there.
_SAFE_TO_CHANGE = ("checkpoint", "log", "mesh")
_SAFE_KEYS = (
    "grpo.steps",
    "data.threads",
    "data.workers",
    "model.attention",
    "model.remat",
    "rollout.attention",
)


@dataclass
class Parts:
    """What a run is made of, opened and found to fit together; nothing is written for it."""

    config: Config
    layout: Layout
    rollout_layout: Layout
    model: models.ModelFolder
    processor: Processor
    source: AnySource
    split: Split
    collate: Collate
    compute: Compute
    questions: Benchmark | None


@dataclass
class Run(Parts):
    """Everything a run holds while it goes on; built once by `open_run`."""

    workdir: epath.Path
    engine: Engine
    evaluation: PretextEval
    benchmark: BenchmarkEval | None
    checkpoints: Checkpoints
    progress: Progress
    preemption: Preemption
    compilations: Compilations
    metrics: MetricsWriter | None
    heldout: dict[str, Table] = field(default_factory=dict)
    best: Best | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    tried: int = 0
    bad: int = 0
    unwritten: set[str] = field(default_factory=set)  # files for people that could not be written

    @property
    def total(self) -> int:
        return self.config.sft.steps + self.config.grpo.steps


def open_parts(config: Config) -> Parts:
    """Opens model, source and devices; refuses what does not fit together.

    Raises:
      UserError: something is missing, or does not belong together.
    """
    model = models.open_model(config.model.path)
    check_start(config, model)
    check_tracker(config.log.wandb)
    source = open_source(config.data.source)
    layout = Layout(make_mesh(config.mesh))
    compute = compute_of(config, layout)
    data = config.data
    processor = Processor(model.files, model.config, data.min_pixels, data.max_pixels)
    split = split_records(source, data.heldout_share)
    items_of(config, source, split.train, processor, config.seed)  # refuses tasks without depth
    check_fits(source, split.train, config.tasks, processor, _limit(config))
    if config.sft.steps and config.sft.responses != "made":
        open_source(f"ssrl81k:{config.sft.responses}")
    rollout_layout = check_shards(config, model.config, layout)
    collate = Collate(data.prompt_buckets, data.window_buckets, config.model.dtype)
    questions = open_questions(config)
    return Parts(
        config, layout, rollout_layout, model, processor, source, split, collate, compute, questions
    )


def compute_of(config: Config, layout: Layout) -> Compute:
    """How the run's programs compute, and where the rows of training's activations lie.

    Raises:
      UserError: the devices do not have what `model.attention` or `rollout.attention` asks for.
    """
    model, there = config.model, (config.model.dtype, layout.mesh)
    kernel = choose_kernel(model.attention, *there)
    step_kernel = choose_step_kernel(config.rollout.attention, *there)
    chunks = (model.chunk, model.head_block)
    return Compute(model.dtype, *chunks, model.remat, kernel, step_kernel, layout.rows())


def open_run(
    config: Config, workdir: epath.Path, overwrite: bool, preemption: Preemption, progress: Progress
) -> Run:
    """Opens model, source and checkpoints; refuses what cannot work before anything is computed."""
    check_bucket(workdir)
    parts = open_parts(config)
    model, layout, processor = parts.model, parts.layout, parts.processor
    if is_writer():
        _claim(config, workdir, overwrite)
        _describe_model(model, workdir / "checkpoints" / MODEL)
        pass_over_damaged(workdir / "checkpoints", progress.say)
    wait_for_all("the run's folder")
    rollout = config.rollout
    engine = Engine(
        model.config,
        parts.compute,
        processor.stop_ids,
        rollout.chunk,
        rollout.check_every,
        parts.rollout_layout.batch_shards,
        parts.rollout_layout,
    )
    checkpoints = Checkpoints(
        workdir / "checkpoints", config.checkpoint.keep, always=[config.sft.steps]
    )
    train, heldout = (len(pool) for pool in (parts.split.train, parts.split.heldout))
    progress.say(f"{train} training and {heldout} held-out pictures from {parts.source.spec}")
    return Run(
        **vars(parts),
        workdir=workdir,
        engine=engine,
        evaluation=PretextEval(
            heldout_items(heldout_datasets(parts), config.eval.examples, progress.say),
            engine,
            processor,
            layout,
            parts.collate,
            config.eval,
            config.rollout,
            config.reward,
            config.grpo.temperature,
        ),
        benchmark=_benchmark(parts, engine),
        checkpoints=checkpoints,
        progress=progress,
        preemption=preemption,
        compilations=Compilations(),
        metrics=_metrics(config, workdir, checkpoints.latest() or 0) if is_writer() else None,
    )


def _benchmark(parts: Parts, engine: Engine) -> BenchmarkEval | None:
    if parts.questions is None:
        return None
    how = how_to_ask(parts.config, parts.layout)
    return BenchmarkEval(parts.questions, parts.model.files, engine, parts.layout, how)


def newest_step(run: Run) -> int:
    """The newest checkpoint's step, 0 where there is none; every process must see the same.

    Raises:
      UserError: they do not.
    """
    seen = gather_rows(np.array([run.checkpoints.latest() or 0]))
    if len(set(seen.tolist())) > 1:
        raise UserError(
            f"the processes see different checkpoints in {run.workdir} (steps "
            f"{', '.join(map(str, seen.tolist()))}): give a --workdir that all of them share."
        )
    return int(seen[0])


def _metrics(config: Config, workdir: epath.Path, step: int) -> MetricsWriter:
    project, tracker = config.log.wandb, None
    if project:
        tracker = Tracker(project, config.name, workdir, to_dict(config))
    return MetricsWriter(workdir, step, tracker=tracker)


def heldout_datasets(parts: Parts) -> dict[str, grain.MapDataset]:
    """Each task alone over the held-out records."""
    config, pool = parts.config, parts.split.heldout
    processor, limit = parts.processor, _limit(config)
    return task_datasets(parts.source, pool, config.tasks, processor, config.seed + 1, limit)


def pipeline(
    parts: Parts, settings: SftSettings | GrpoSettings, start: int
) -> grain.DatasetIterator:
    """The batches of a stage, given by its section, from its step `start` on."""
    config = parts.config
    seed = config.seed * 2 + (settings is config.grpo)
    source, pool = parts.source, parts.split.train
    if settings is config.sft and settings.responses != "made":
        source = open_source(f"ssrl81k:{settings.responses}")
        pool = range(len(source))
    items = items_of(config, source, pool, parts.processor, seed)
    return batches(
        items,
        settings.prompts,
        settings.micro_prompts if isinstance(settings, GrpoSettings) else settings.prompts,
        parts.collate,
        start=start,
        threads=config.data.threads,
        workers=config.data.workers,
        process=jax.process_index(),
        processes=jax.process_count(),
    )


def check_bad(parts: Parts, bad: int, tried: int) -> None:
    """Refuses a source of which too many pictures could not be used.

    Raises:
      UserError: of at least twenty, more than `data.max_bad_share`.
    """
    if tried >= 20 and bad > parts.config.data.max_bad_share * tried:
        raise UserError(
            f"{bad} of {tried} pictures from {parts.source.spec} could not be used: "
            "mend the source, or raise data.max_bad_share."
        )


def items_of(
    config: Config, source: AnySource, pool: Sequence[int], processor: Processor, seed: int
) -> grain.MapDataset:
    """The config's tasks over the records `pool` of a source, as an endless stream."""
    return item_dataset(source, pool, config.tasks, processor, seed, _limit(config))


def _limit(config: Config) -> Extent:
    """The largest prompt that the buckets hold."""
    return Extent(max(config.data.prompt_buckets), max(config.data.window_buckets))


def check_shards(config: Config, model: Qwen2_5_VLConfig, layout: Layout) -> Layout:
    """Refuses weights and batches that cannot be cut over the devices.

    Args:
      config: the run.
      model: the model's shape.
      layout: for training.

    Returns:
      The layout for sampling.

    Raises:
      UserError: names the setting, and the axis of a weight or what it must be a multiple of.
    """
    layout.params(model)
    rollout = layout.rollout(config.rollout.tensor)
    rollout.params(model, part="text/")
    sampled, trained = {"eval.prompts": config.eval.prompts}, {}
    if config.sft.steps:
        trained["sft.micro_rows"] = config.sft.micro_rows
    if config.grpo.steps:
        trained["grpo.micro_prompts"] = config.grpo.micro_prompts
        sampled["rollout.wave"] = config.rollout.wave
    processes = jax.process_count()
    if config.sft.steps and config.sft.prompts % processes:
        raise UserError(
            f"sft.prompts={config.sft.prompts} must be a multiple of the {processes} processes."
        )
    # What is sampled is prefilled where training lies, and decoded in the other layout.
    over = "the devices over rollout.tensor"
    _check_parts(sampled, rollout.batch_shards, over)
    _check_parts(sampled | trained, layout.batch_shards, "mesh.data x mesh.fsdp")
    return rollout


def _check_parts(sizes: dict[str, int], parts: int, by: str) -> None:
    for name, value in sizes.items():
        if value % parts:
            raise UserError(
                f"{name}={value} must be a multiple of the {parts} parts that {by} cuts a batch "
                "into."
            )


def check_workdir(config: Config, workdir: epath.Path, overwrite: bool) -> bool:
    """Refuses a folder that cannot be this run's; changes nothing.

    Returns:
      Whether the same run stopped there, so that it goes on.

    Raises:
      UserError: it cannot be written to, is not empty, or holds another run.
    """
    if not in_bucket(workdir):
        place = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            why = "is not writable" if place.is_dir() else "is a file"
            raise UserError(
                f"nothing can be written to {workdir} ({place} {why}): change --workdir."
            )
    path = workdir / "config.json"
    if overwrite or not path.is_file():
        check_folder(workdir, overwrite)
        return False
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): choose another --workdir, or give --overwrite."
        ) from error
    _check_same(before, json.loads(json.dumps(to_dict(config))), workdir)
    return True


def _claim(config: Config, workdir: epath.Path, overwrite: bool) -> None:
    """Makes the folder this run's: new, or one where the same run stopped."""
    if not check_workdir(config, workdir, overwrite):
        claim_folder(workdir, overwrite)
    # Beside the folder: one that holds nothing but a part of it would be taken for another's.
    partial = workdir.parent / f".{workdir.name}-config.partial"
    text = json.dumps(to_dict(config), indent=2) + "\n"
    write_whole(workdir / "config.json", text, partial)


def _check_same(before: dict, now: dict, workdir: epath.Path) -> None:
    changed = [key for key in _differences(before, now) if not _is_safe(key)]
    if changed:
        raise UserError(
            f"{workdir} holds a run with another config ({', '.join(changed[:4])} changed): "
            "go on with the old values, choose another --workdir, or give --overwrite."
        )


def _is_safe(key: str) -> bool:
    return key.split(".")[0] in _SAFE_TO_CHANGE or key in _SAFE_KEYS


def _differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield path


def _describe_model(model: models.ModelFolder, folder: epath.Path) -> None:
    if (folder / "config.json").exists():
        return
    with whole_folder(folder) as partial:
        models.copy_files(model, partial)
        models.write_config(model.config, partial, "float32")
