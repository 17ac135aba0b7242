"""Everything a run holds while it continues, and opening it: what cannot work is refused here."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import grain
import jax
import numpy as np
from etils import epath

from spatial_ssrl_jax.checkpoint.manager import MODEL, Checkpoints, set_aside_damaged
from spatial_ssrl_jax.checkpoint.models import ModelFolder, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.paths import check_bucket
from spatial_ssrl_jax.config.load import to_dict
from spatial_ssrl_jax.config.schema import Config, GrpoSettings, SftSettings
from spatial_ssrl_jax.data.items import check_fits, item_dataset
from spatial_ssrl_jax.data.pipeline import Collate, batches
from spatial_ssrl_jax.data.processor import Processor, PromptSize
from spatial_ssrl_jax.data.sources import AnySource, open_source
from spatial_ssrl_jax.data.split import RecordSplit, split_records
from spatial_ssrl_jax.eval.benchmarks.registry import Benchmark
from spatial_ssrl_jax.eval.heldout import HeldoutEval, HeldoutTable, heldout_items, task_datasets
from spatial_ssrl_jax.monitoring.metrics import MetricsWriter
from spatial_ssrl_jax.monitoring.process_stats import CompilationCounter
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.monitoring.wandb_run import WandbRun, check_wandb
from spatial_ssrl_jax.parallel.collectives import all_gather, barrier, is_primary
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.rl.placement import check_sharding, compute_settings
from spatial_ssrl_jax.rollout.engine import Engine
from spatial_ssrl_jax.trainer.benchmark_eval import BenchmarkEval, eval_options, open_eval_benchmark
from spatial_ssrl_jax.trainer.best_checkpoint import BestCheckpoint
from spatial_ssrl_jax.trainer.initial_state import check_initial_weights
from spatial_ssrl_jax.trainer.preemption import Preemption
from spatial_ssrl_jax.trainer.workdir import _claim, _describe_model


@dataclass
class RunComponents:
    """What a run is made of, opened and found to fit together; nothing is written for it."""

    config: Config
    layout: Layout
    rollout_layout: Layout
    model: ModelFolder
    processor: Processor
    source: AnySource
    split: RecordSplit
    collate: Collate
    compute: Compute
    questions: Benchmark | None


@dataclass
class Run(RunComponents):
    """Everything a run holds while it continues; built once by `open_run`."""

    workdir: epath.Path
    engine: Engine
    evaluation: HeldoutEval
    benchmark: BenchmarkEval | None
    checkpoints: Checkpoints
    progress: Progress
    preemption: Preemption
    compilations: CompilationCounter
    metrics: MetricsWriter | None
    heldout: dict[str, HeldoutTable] = field(default_factory=dict)
    best: BestCheckpoint | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    tried: int = 0
    bad: int = 0
    unwritten: set[str] = field(default_factory=set)  # files for people that could not be written

    @property
    def total(self) -> int:
        return self.config.sft.steps + self.config.grpo.steps


def open_components(config: Config) -> RunComponents:
    """Opens model, source and devices; refuses what does not fit together.

    Raises:
      UserError: something is missing, or does not belong together.
    """
    model = open_model(config.model.path)
    check_initial_weights(config, model)
    check_wandb(config.log.wandb)
    source = open_source(config.data.source)
    layout = Layout(make_mesh(config.mesh))
    compute = compute_settings(config, layout)
    data = config.data
    processor = Processor(model.files, model.config, data.min_pixels, data.max_pixels)
    split = split_records(source, data.heldout_fraction)
    items_of(config, source, split.train, processor, config.seed)  # refuses tasks without depth
    check_fits(source, split.train, config.tasks, processor, _limit(config))
    if config.sft.steps and config.sft.responses != "made":
        open_source(f"ssrl81k:{config.sft.responses}")
    rollout_layout = check_sharding(config, model.config, layout)
    collate = Collate(data.prompt_buckets, data.window_buckets, config.model.dtype)
    questions = open_eval_benchmark(config)
    return RunComponents(
        config, layout, rollout_layout, model, processor, source, split, collate, compute, questions
    )


def open_run(
    config: Config, workdir: epath.Path, overwrite: bool, preemption: Preemption, progress: Progress
) -> Run:
    """Opens model, source and checkpoints; refuses what cannot work before anything is computed."""
    check_bucket(workdir)
    parts = open_components(config)
    model, layout, processor = parts.model, parts.layout, parts.processor
    if is_primary():
        _claim(config, workdir, overwrite)
        _describe_model(model, workdir / "checkpoints" / MODEL)
        set_aside_damaged(workdir / "checkpoints", progress.say)
    barrier("the run's folder")
    rollout = config.rollout
    engine = Engine(
        model.config,
        parts.compute,
        processor.stop_ids,
        rollout.kv_block,
        rollout.check_every,
        parts.rollout_layout.batch_shards,
        parts.rollout_layout,
    )
    checkpoints = Checkpoints(
        workdir / "checkpoints", config.checkpoint.keep, always=[config.sft.steps]
    )
    train, heldout = (len(pool) for pool in (parts.split.train, parts.split.heldout))
    progress.say(f"{train} training and {heldout} held-out images from {parts.source.spec}")
    return Run(
        **vars(parts),
        workdir=workdir,
        engine=engine,
        evaluation=HeldoutEval(
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
        compilations=CompilationCounter(),
        metrics=_metrics(config, workdir, checkpoints.latest() or 0) if is_primary() else None,
    )


def _benchmark(parts: RunComponents, engine: Engine) -> BenchmarkEval | None:
    if parts.questions is None:
        return None
    how = eval_options(parts.config, parts.layout)
    return BenchmarkEval(parts.questions, parts.model.files, engine, parts.layout, how)


def newest_step(run: Run) -> int:
    """The newest checkpoint's step, 0 where there is none; every process must see the same.

    Raises:
      UserError: they do not.
    """
    seen = all_gather(np.array([run.checkpoints.latest() or 0]))
    if len(set(seen.tolist())) > 1:
        raise UserError(
            f"the processes see different checkpoints in {run.workdir} (steps "
            f"{', '.join(map(str, seen.tolist()))}): give a --workdir that all of them share."
        )
    return int(seen[0])


def _metrics(config: Config, workdir: epath.Path, step: int) -> MetricsWriter:
    project, tracker = config.log.wandb, None
    if project:
        tracker = WandbRun(project, config.name, workdir, to_dict(config))
    return MetricsWriter(workdir, step, tracker=tracker)


def heldout_datasets(parts: RunComponents) -> dict[str, grain.MapDataset]:
    """Each task alone over the held-out records."""
    config, pool = parts.config, parts.split.heldout
    processor, limit = parts.processor, _limit(config)
    return task_datasets(parts.source, pool, config.tasks, processor, config.seed + 1, limit)


def pipeline(
    parts: RunComponents, settings: SftSettings | GrpoSettings, start: int
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
        settings.micro_batch_prompts if isinstance(settings, GrpoSettings) else settings.prompts,
        parts.collate,
        start=start,
        threads=config.data.threads,
        workers=config.data.workers,
        process=jax.process_index(),
        processes=jax.process_count(),
    )


def check_bad_fraction(parts: RunComponents, bad: int, tried: int) -> None:
    """Refuses a source of which too many images could not be used.

    Raises:
      UserError: of at least twenty, more than `data.max_bad_fraction`.
    """
    if tried >= 20 and bad > parts.config.data.max_bad_fraction * tried:
        raise UserError(
            f"{bad} of {tried} images from {parts.source.spec} could not be used: "
            "fix the source, or raise data.max_bad_fraction."
        )


def items_of(
    config: Config, source: AnySource, pool: Sequence[int], processor: Processor, seed: int
) -> grain.MapDataset:
    """The config's tasks over the records `pool` of a source, as an endless stream."""
    return item_dataset(source, pool, config.tasks, processor, seed, _limit(config))


def _limit(config: Config) -> PromptSize:
    """The largest prompt that the buckets hold."""
    return PromptSize(max(config.data.prompt_buckets), max(config.data.window_buckets))
