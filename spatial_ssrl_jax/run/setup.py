"""Everything a run holds while it goes on, and opening it: what cannot work is refused here."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grain

from spatial_ssrl_jax.config import Config, to_dict
from spatial_ssrl_jax.data.items import item_dataset
from spatial_ssrl_jax.data.pipeline import Collate, Split, split_records
from spatial_ssrl_jax.data.prompts import Extent, Processor
from spatial_ssrl_jax.data.sources import AnySource, Source, open_source
from spatial_ssrl_jax.errors import UserError
from spatial_ssrl_jax.eval.pretext import PretextEval, Table, heldout_items
from spatial_ssrl_jax.qwen2_5_vl.model import Compute
from spatial_ssrl_jax.rollout.engine import Engine
from spatial_ssrl_jax.run import models
from spatial_ssrl_jax.run.checkpoint import MODEL, Checkpoints, pass_over_damaged
from spatial_ssrl_jax.run.mesh import (
    Layout,
    is_writer,
    make_mesh,
    wait_for_all,
)
from spatial_ssrl_jax.run.metrics import MetricsWriter
from spatial_ssrl_jax.run.monitor import Compilations
from spatial_ssrl_jax.run.preemption import Preemption
from spatial_ssrl_jax.run.progress import Progress
from spatial_ssrl_jax.run.start import check_init_from
from spatial_ssrl_jax.tasks import TASKS

# Changing these between two starts of one run does not change what was trained before.
_SAFE_TO_CHANGE = ("checkpoint", "log")
_SAFE_KEYS = ("grpo.steps", "data.threads", "data.workers")


@dataclass
class Run:
    """Everything a run holds while it goes on; built once by `open_run`."""

    config: Config
    workdir: Path
    layout: Layout
    model: models.ModelFolder
    processor: Processor
    source: Source
    split: Split
    collate: Collate
    compute: Compute
    engine: Engine
    evaluation: PretextEval
    checkpoints: Checkpoints
    progress: Progress
    preemption: Preemption
    compilations: Compilations
    metrics: MetricsWriter | None
    heldout: dict[str, Table] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tried: int = 0
    bad: int = 0
    unwritten: set[str] = field(default_factory=set)  # files for people that could not be written

    @property
    def total(self) -> int:
        return self.config.sft.steps + self.config.grpo.steps


def open_run(
    config: Config, workdir: Path, overwrite: bool, preemption: Preemption, progress: Progress
) -> Run:
    """Opens model, source and checkpoints; refuses what cannot work before anything is computed."""
    model = models.open_model(config.model.path)
    check_init_from(config, model)
    source = open_source(config.data.source)
    layout = Layout(make_mesh(config.mesh))
    data = config.data
    processor = Processor(model.files, model.config, data.min_pixels, data.max_pixels)
    split = split_records(source, data.heldout_share)
    items_of(config, source, split.train, processor, config.seed)  # refuses tasks without depth
    if config.sft.steps and config.sft.responses != "made":
        open_source(f"ssrl81k:{config.sft.responses}")
    _check_shards(config, layout)
    if is_writer():
        _claim(config, workdir, overwrite)
        _describe_model(model, workdir / "checkpoints" / MODEL)
        pass_over_damaged(workdir / "checkpoints", progress.say)
    wait_for_all("the run's folder")
    compute = Compute(
        config.model.dtype, config.model.chunk, config.model.head_chunk, config.model.remat
    )
    rollout = config.rollout
    engine = Engine(
        model.config,
        compute,
        processor.stop_ids,
        rollout.chunk,
        rollout.check_every,
        layout.batch_shards,
    )
    collate = Collate(data.prompt_buckets, data.window_buckets)
    checkpoints = Checkpoints(
        str(workdir / "checkpoints"), config.checkpoint.keep, always=[config.sft.steps]
    )
    progress.say(
        f"{len(split.train)} training and {len(split.heldout)} held-out pictures from {source.spec}"
    )
    return Run(
        config=config,
        workdir=workdir,
        layout=layout,
        model=model,
        processor=processor,
        source=source,
        split=split,
        collate=collate,
        compute=compute,
        engine=engine,
        evaluation=PretextEval(
            heldout_items(
                _heldout_datasets(config, source, split, processor),
                config.eval.examples,
                progress.say,
            ),
            engine,
            processor,
            layout,
            collate,
            config.eval,
            config.rollout,
            config.reward,
            config.grpo.temperature,
        ),
        checkpoints=checkpoints,
        progress=progress,
        preemption=preemption,
        compilations=Compilations(),
        metrics=MetricsWriter(workdir, checkpoints.latest() or 0) if is_writer() else None,
    )


def _heldout_datasets(config: Config, source: Source, split: Split, processor: Processor):
    if not split.heldout:
        return {}
    datasets = {}
    for task in TASKS:
        if task.needs_depth and not source.has_depth:
            continue
        alone = {name: _weighted(s, float(name == task.name)) for name, s in config.tasks.items()}
        settings = replace(config, tasks=alone)
        datasets[task.name] = items_of(settings, source, split.heldout, processor, config.seed + 1)
    return datasets


def items_of(
    config: Config, source: AnySource, pool: Sequence[int], processor: Processor, seed: int
) -> grain.MapDataset:
    """The config's tasks over the records `pool` of a source, as an endless stream."""
    limit = Extent(max(config.data.prompt_buckets), max(config.data.window_buckets))
    return item_dataset(source, pool, config.tasks, processor, seed, limit)


def _check_shards(config: Config, layout: Layout) -> None:
    """Refuses batches that cannot be cut over the devices."""
    sizes = {"eval.prompts": config.eval.prompts}
    if config.sft.steps:
        sizes["sft.micro_prompts"] = config.sft.micro_prompts
    if config.grpo.steps:
        sizes["grpo.micro_prompts"] = config.grpo.micro_prompts
        sizes["rollout.wave"] = config.rollout.wave
    for name, value in sizes.items():
        if value % layout.batch_shards:
            raise UserError(
                f"{name}={value} must be a multiple of the {layout.batch_shards} parts that "
                "mesh.data x mesh.fsdp cuts a batch into."
            )


def _weighted(settings: Any, weight: float) -> Any:
    return replace(settings, weight=weight)


def _claim(config: Config, workdir: Path, overwrite: bool) -> None:
    """Makes the folder this run's: new, or one where the same run stopped."""
    path = workdir / "config.json"
    if not overwrite and path.is_file():
        _check_same(json.loads(path.read_text()), json.loads(json.dumps(to_dict(config))), workdir)
    else:
        models.claim_folder(workdir, overwrite)
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def _check_same(before: dict, now: dict, workdir: Path) -> None:
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


def _describe_model(model: models.ModelFolder, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    models.copy_files(model, folder)
    models.write_config(model.config, folder, "float32")
