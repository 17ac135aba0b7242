"""A run's components and state, and opening them with all checks before any computation."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import grain
import jax
import numpy as np
from etils import epath

from spatial_ssrl_jax.checkpoint.manager import MODEL, RENAME, Checkpoints, set_aside_damaged
from spatial_ssrl_jax.checkpoint.models import ModelFolder, open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import JsonObject
from spatial_ssrl_jax.common.lock import locked
from spatial_ssrl_jax.common.paths import check_bucket
from spatial_ssrl_jax.config.load import to_dict
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.items import check_fits, item_dataset, question_dataset
from spatial_ssrl_jax.data.pipeline import BatchStream, batches, repeated
from spatial_ssrl_jax.data.processor import ImageArea, Processor, PromptSize
from spatial_ssrl_jax.data.sources import AnySource, QuestionSource, open_source
from spatial_ssrl_jax.data.split import RecordSplit, split_records
from spatial_ssrl_jax.data.task_sources import check_served, tasks_for, trained_tasks
from spatial_ssrl_jax.eval.benchmarks.registry import Benchmark
from spatial_ssrl_jax.eval.heldout import HeldoutEval, HeldoutTable
from spatial_ssrl_jax.eval.heldout_items import heldout_items, task_datasets
from spatial_ssrl_jax.monitoring.metrics import MetricsWriter
from spatial_ssrl_jax.monitoring.process_stats import CompilationCounter
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.monitoring.wandb_run import WandbRun, check_wandb
from spatial_ssrl_jax.parallel.collectives import all_gather, barrier, is_primary
from spatial_ssrl_jax.parallel.compilation_cache import compilation_cache
from spatial_ssrl_jax.parallel.compile_ahead import CompileAhead, compiles_ahead
from spatial_ssrl_jax.parallel.distributed import await_primary
from spatial_ssrl_jax.parallel.host_gap import HostGap
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.perf.device_specs import device_memory_bytes
from spatial_ssrl_jax.qwen_vl.compute import Compute
from spatial_ssrl_jax.rl.bucketing import Buckets
from spatial_ssrl_jax.rl.placement import check_sharding, compute_settings, rollout_prompts
from spatial_ssrl_jax.rl.rewards import check_rules
from spatial_ssrl_jax.rl.row_shapes import row_shapes
from spatial_ssrl_jax.rl.scorer import Scorer, make_scorer
from spatial_ssrl_jax.rl.sft import check_response
from spatial_ssrl_jax.rl.stages import GrpoStage, SftStage, stages
from spatial_ssrl_jax.rollout.engine import Engine
from spatial_ssrl_jax.tasks.example import Tasks
from spatial_ssrl_jax.trainer.bad_records import check_bad_rows
from spatial_ssrl_jax.trainer.benchmark_eval import BenchmarkEval, eval_options, open_eval_benchmark
from spatial_ssrl_jax.trainer.best_checkpoint import BestCheckpoint
from spatial_ssrl_jax.trainer.initial_state import check_initial_weights
from spatial_ssrl_jax.trainer.preemption import Preemption
from spatial_ssrl_jax.trainer.reward_check import check_rewards
from spatial_ssrl_jax.trainer.run_inputs import RunInputs, left_out
from spatial_ssrl_jax.trainer.workdir import check_workdir, claim_workdir, write_model_files

_FOLDER_SECONDS = 900  # for the primary process to wait for the lock and hash the inputs


@dataclass(frozen=True)
class RunComponents:
    """The components of a run, opened and checked to fit together; nothing is written."""

    config: Config
    layout: Layout
    rollout_layout: Layout
    model: ModelFolder
    processor: Processor
    source: AnySource
    tasks: Tasks
    split: RecordSplit
    compute: Compute
    questions: Benchmark | None
    rollout_prompts: int

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the tasks with a weight in the training mixture."""
        return tuple(task.name for task in trained_tasks(self.tasks))


@dataclass
class RunState:
    """What a run changes from step to step, beside the weights; a checkpoint holds it.

    Attributes:
      heldout: held-out metrics, stage -> task -> metric.
      best: the best step so far.
      seconds: time spent, by stage and measurement.
      tried: images tried so far, over all processes.
      bad: how many of them could not be used.
      skipped: optimizer steps that were skipped, as their gradient was not finite.
    """

    heldout: dict[str, HeldoutTable] = field(default_factory=dict)
    best: BestCheckpoint | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    tried: int = 0
    bad: int = 0
    skipped: int = 0

    def as_meta(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def restore(self, meta: dict[str, Any]) -> None:
        """Takes the values that `as_meta` gave; those of older checkpoints may lack some.

        Raises:
          UserError: a value is of another type.
        """
        stored = JsonObject(meta, "the checkpoint's meta", RENAME)
        for name in ("heldout", "seconds"):
            setattr(self, name, stored.get(name, dict, {}))
        for name in ("tried", "bad", "skipped"):
            setattr(self, name, stored.get(name, int, 0))
        best = stored.section("best")
        if best.values:
            step, metric = best.get("step", int), best.get("metric", str)
            self.best = BestCheckpoint(step, metric, best.get("value", float))


@dataclass(frozen=True)
class Run(RunComponents):
    """A run's components and its writers, built once by `open_run`, and its state.

    Attributes:
      ahead: compiles programs of updates; `engine` has a queue of its own, which the long ones of
        updates do not hold up.
      unwritten: files for people whose last write failed.
    """

    workdir: epath.Path
    engine: Engine
    scorer: Scorer
    evaluation: HeldoutEval
    benchmark: BenchmarkEval | None
    checkpoints: Checkpoints
    progress: Progress
    preemption: Preemption
    compilations: CompilationCounter
    ahead: CompileAhead
    gap: HostGap
    metrics: MetricsWriter | None
    state: RunState = field(default_factory=RunState)
    unwritten: set[str] = field(default_factory=set)

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return max((stage.last_step for stage in stages(self.config)), default=0)


def open_components(config: Config) -> RunComponents:
    """Opens model, source and devices, and checks that they fit together.

    Raises:
      UserError: something is missing, or does not fit.
    """
    model = open_model(config.model.path)
    check_initial_weights(config, model)
    check_wandb(config.log.wandb)
    check_rules(config.reward)
    source = open_source(config.data.source, config.data.reading, config.all_tasks)
    check_bad_rows(config, source)
    tasks = tasks_for(source, config.task_settings)
    layout = Layout(make_mesh(config.mesh))
    compute = compute_settings(config, layout)
    data = config.data
    area = ImageArea(data.min_pixels, data.max_pixels)
    processor = Processor(model.files, model.config, area=area)
    _check_end_token(processor)
    split = split_records(source, data.heldout_fraction)
    check_served(source, tasks)
    limit = _limit(config)
    item_dataset(source, split.train, tasks, processor, config.seed, limit)  # checks needs
    check_fits(source, split.train, tasks, processor, limit)
    if config.sft.steps and config.sft.responses_spec:
        _check_responses(config, config.sft.responses_spec, processor)
    if config.grpo.steps:
        datasets = task_datasets(source, split.train, tasks, processor, config.seed, limit)
        names = [task.name for task in trained_tasks(tasks)]
        check_rewards(config, {name: datasets[name] for name in names}, processor)
    rollout_layout = check_sharding(config, model.config, layout)
    for stage in stages(config):
        row_shapes(config, stage, compute.attention)  # checks that they hold the largest groups
    questions = open_eval_benchmark(config)
    # The least of all processes, which must sample as many prompts at a time.
    memory = int(all_gather(np.array([device_memory_bytes() or 0])).min()) or None
    return RunComponents(
        config=config,
        layout=layout,
        rollout_layout=rollout_layout,
        model=model,
        processor=processor,
        source=source,
        tasks=tasks,
        split=split,
        compute=compute,
        questions=questions,
        rollout_prompts=rollout_prompts(config, model.config, layout, rollout_layout, memory),
    )


def _check_responses(config: Config, spec: str, processor: Processor) -> None:
    """Opens a cold start's file; raises `UserError` where a response is longer than the limit."""
    source = open_source(spec, config.data.reading)
    assert isinstance(source, QuestionSource)  # as the SPEC says
    check_bad_rows(config, source)
    for index, question in enumerate(source.questions):
        tokens = len(processor.encode_response(question.response))
        check_response(tokens, config.rollout.max_new_tokens, source.name(index))


def _check_end_token(processor: Processor) -> None:
    """Raises `UserError` where the end token of SFT's responses would not end a rollout."""
    taught = processor.config.eos_token_id
    if taught not in processor.stop_ids:
        raise UserError(
            f"{processor.folder / 'generation_config.json'} ends responses at the tokens "
            f"{list(processor.stop_ids)}, but {taught}, config.json's eos_token_id, ends those "
            "that SFT teaches: add it to eos_token_id there."
        )


def open_run(
    config: Config,
    workdir: epath.Path,
    overwrite: bool,
    preemption: Preemption,
    progress: Progress,
    resources: ExitStack,
) -> Run:
    """Opens components, checkpoints and writers; all checks come before any computation.

    Args:
      config: the run.
      workdir: its folder, created or resumed.
      overwrite: empty the folder first.
      preemption: receives the signals.
      progress: shows what is done.
      resources: what ends with the run: the folder's lock, and processes.

    Raises:
      UserError: something is missing, or does not fit.
    """
    check_bucket(workdir)
    components = open_components(config)
    model, processor = components.model, components.processor
    if is_primary():
        _open_workdir(components, workdir, overwrite, progress.say, resources)
    await_primary("the run's folder", _FOLDER_SECONDS)
    barrier("the run's folder")
    resources.enter_context(compilation_cache(config.compile, workdir, progress.say))
    rollout, ahead = config.rollout, compiles_ahead(config.compile.ahead)
    engine = Engine(
        model.config,
        components.compute,
        processor.stop_ids,
        rollout.kv_block,
        rollout.check_every,
        components.rollout_layout.batch_shards,
        components.rollout_layout,
        CompileAhead(ahead, progress.say),
    )
    scorer = make_scorer(config.reward, config.all_tasks)
    resources.callback(scorer.close)
    between = [stage.last_step for stage in stages(config)[:-1]]  # where the next stage starts
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep, always=between)
    train, heldout = (len(pool) for pool in (components.split.train, components.split.heldout))
    progress.say(f"{train} training and {heldout} held-out images from {components.source.spec}")
    for note in left_out(config, components.source):
        progress.say(note)
    return Run(
        **vars(components),
        workdir=workdir,
        engine=engine,
        scorer=scorer,
        evaluation=HeldoutEval(
            heldout_items(
                heldout_datasets(components),
                config.eval.examples,
                components.trained,
                progress.say,
            ),
            Buckets.of(config),
            config.eval,
            config.rollout,
            scorer,
            {task.name: task.chance for task in components.tasks if task.chance is not None},
            config.grpo.temperature,
        ),
        benchmark=_benchmark(components),
        checkpoints=checkpoints,
        progress=progress,
        preemption=preemption,
        compilations=CompilationCounter(),
        ahead=CompileAhead(ahead, progress.say),
        gap=HostGap(),
        metrics=_metrics(config, workdir, checkpoints.latest() or 0) if is_primary() else None,
    )


def _open_workdir(
    components: RunComponents,
    workdir: epath.Path,
    overwrite: bool,
    say: Callable[[str], None],
    resources: ExitStack,
) -> None:
    """Locks a run's folder and makes it ready; nothing is made before all checks pass."""
    config, model = components.config, components.model
    inputs = RunInputs.of(config, model, components.source)
    check_workdir(config, workdir, overwrite, inputs)
    workdir.mkdir(parents=True, exist_ok=True)
    resources.enter_context(locked(workdir, say))
    claim_workdir(config, workdir, overwrite, inputs)
    stop_ids, temperature = components.processor.stop_ids, config.grpo.temperature
    write_model_files(model, stop_ids, temperature, workdir / "checkpoints" / MODEL)
    set_aside_damaged(workdir / "checkpoints", say)


def _benchmark(components: RunComponents) -> BenchmarkEval | None:
    if components.questions is None:
        return None
    options = eval_options(components.config, components.layout)
    return BenchmarkEval(components.questions, options)


def newest_step(run: Run) -> int:
    """The newest checkpoint's step, or 0.

    Raises:
      UserError: the processes see different checkpoints.
    """
    seen = all_gather(np.array([run.checkpoints.latest() or 0]))
    if len(set(seen.tolist())) > 1:
        raise UserError(
            f"the processes see different checkpoints in {run.workdir} (steps "
            f"{', '.join(map(str, seen.tolist()))}): give a --workdir on a shared file system."
        )
    return int(seen[0])


def _metrics(config: Config, workdir: epath.Path, step: int) -> MetricsWriter:
    project, tracker = config.log.wandb, None
    if project:
        tracker = WandbRun(project, config.name, workdir, to_dict(config))
    return MetricsWriter(workdir, step, tracker=tracker)


def heldout_datasets(components: RunComponents) -> dict[str, grain.MapDataset]:
    """Each task's examples of the held-out records."""
    config, pool = components.config, components.split.heldout
    processor, limit = components.processor, _limit(config)
    tasks, seed = components.tasks, config.seed + 1
    return task_datasets(components.source, pool, tasks, processor, seed, limit)


def pipeline(components: RunComponents, stage: SftStage | GrpoStage, start: int) -> BatchStream:
    """A stage's batches for this process, from the stage's step `start`.

    Args:
      components: the run.
      stage: the stage.
      start: steps already done.
    """
    config, source, epoch = components.config, components.source, None
    if isinstance(stage, SftStage):
        epoch = stage.settings.examples or None
    if isinstance(stage, SftStage) and stage.settings.responses_spec:
        source = open_source(stage.settings.responses_spec, config.data.reading)
        items = _items_of_file(components, stage, source)
        epoch = min(epoch or len(source), len(source))
    else:
        pool = components.split.train
        items = items_of(components, stage.seed, source, pool)
    if epoch:
        items = repeated(items, epoch, stage.seed)
    return batches(
        items,
        stage.settings.prompts,
        stage.update_prompts,
        start=start,
        threads=config.data.threads,
        workers=config.data.workers,
        process=jax.process_index(),
        processes=jax.process_count(),
        epoch=epoch,
    )


def _items_of_file(
    components: RunComponents, stage: SftStage, source: AnySource
) -> grain.MapDataset:
    """The questions of a cold start's file."""
    config, pool = components.config, range(len(source))
    if stage.settings.task_shares == "file" and isinstance(source, QuestionSource):
        return question_dataset(source, components.processor, stage.seed, _limit(config))
    return items_of(components, stage.seed, source, pool)


def items_of(
    components: RunComponents, seed: int, source: AnySource, pool: Sequence[int]
) -> grain.MapDataset:
    """An endless stream of the config's tasks over the records `pool` of a source."""
    tasks, limit = tasks_for(source, components.config.task_settings), _limit(components.config)
    return item_dataset(source, pool, tasks, components.processor, seed, limit)


def _limit(config: Config) -> PromptSize:
    """The largest prompt that fits the buckets."""
    return PromptSize(*config.data.buckets[-1])
