"""A whole run: the config's stages, from the start or from where the folder stopped."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spatial_ssrl_jax.config import Config, GrpoSettings, SftSettings, to_dict
from spatial_ssrl_jax.data.pipeline import (
    Batch,
    Collate,
    Split,
    batches,
    item_dataset,
    split_records,
)
from spatial_ssrl_jax.data.prompts import Processor
from spatial_ssrl_jax.data.sources import Source, open_source
from spatial_ssrl_jax.errors import UserError
from spatial_ssrl_jax.eval.pretext import PretextEval, Table, heldout_items
from spatial_ssrl_jax.learn.batch import take_rows
from spatial_ssrl_jax.learn.grpo import Grpo, Scored, prompt_metrics
from spatial_ssrl_jax.learn.loss import GrpoLoss, SftLoss
from spatial_ssrl_jax.learn.optimizer import learning_rate, make_optimizer
from spatial_ssrl_jax.learn.sft import response_batch
from spatial_ssrl_jax.learn.update import TrainState, new_state, train_step
from spatial_ssrl_jax.qwen2_5_vl.layers import cast
from spatial_ssrl_jax.qwen2_5_vl.model import Compute, Params
from spatial_ssrl_jax.rollout.engine import Engine
from spatial_ssrl_jax.run import models
from spatial_ssrl_jax.run.checkpoint import MODEL, Checkpoints
from spatial_ssrl_jax.run.mesh import Layout, make_mesh
from spatial_ssrl_jax.run.metrics import MetricsWriter
from spatial_ssrl_jax.run.monitor import Compilations, memory
from spatial_ssrl_jax.run.preemption import Preemption
from spatial_ssrl_jax.run.progress import Progress
from spatial_ssrl_jax.run.report import write_report
from spatial_ssrl_jax.run.rollouts import write_rollouts
from spatial_ssrl_jax.tasks import TASKS

UNTRAINED, SFT, GRPO = "untrained", "sft", "grpo"
# Changing these between two starts of one run does not change what was trained before.
_SAFE_TO_CHANGE = ("checkpoint", "log")


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
    metrics: MetricsWriter
    heldout: dict[str, Table] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tried: int = 0
    bad: int = 0

    @property
    def total(self) -> int:
        return self.config.sft.steps + self.config.grpo.steps


def train(config: Config, workdir: Path, overwrite: bool = False) -> bool:
    """Trains to the end, or until a signal asks to stop.

    Args:
      config: the run.
      workdir: where everything is left; a run that stopped there goes on.
      overwrite: empty the folder first.

    Returns:
      True when the run is complete, False when it stopped early with its state saved.

    Raises:
      UserError: something the user can mend.
    """
    with Preemption() as preemption, Progress() as progress:
        run = open_run(config, workdir, overwrite, preemption, progress)
        done = run.checkpoints.latest()
        finished = _run_stages(run, done or 0)
        run.checkpoints.wait()
        _write_report(run)
        if finished:
            _finish(run)
        return finished


def open_run(
    config: Config, workdir: Path, overwrite: bool, preemption: Preemption, progress: Progress
) -> Run:
    """Opens model, source and checkpoints; refuses what cannot work before anything is computed."""
    model = models.open_model(config.model.path)
    source = open_source(config.data.source)
    layout = Layout(make_mesh(config.mesh))
    data = config.data
    processor = Processor(model.files, model.config, data.min_pixels, data.max_pixels)
    _claim(config, workdir, overwrite)
    _describe_model(model, workdir / "checkpoints" / MODEL)
    compute = Compute(
        config.model.dtype, config.model.chunk, config.model.head_chunk, config.model.remat
    )
    rollout = config.rollout
    engine = Engine(model.config, compute, processor.stop_ids, rollout.chunk, rollout.check_every)
    collate = Collate(data.prompt_buckets, data.window_buckets)
    split = split_records(source, data.heldout_share)
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
                _heldout_datasets(config, source, split, processor), config.eval.examples
            ),
            engine,
            processor,
            layout,
            collate,
            config.eval,
            config.rollout,
            config.grpo,
        ),
        checkpoints=checkpoints,
        progress=progress,
        preemption=preemption,
        compilations=Compilations(),
        metrics=MetricsWriter(workdir, checkpoints.latest() or 0),
    )


def _heldout_datasets(config: Config, source: Source, split: Split, processor: Processor):
    if not split.heldout:
        return {}
    datasets = {}
    for task in TASKS:
        if task.needs_depth and not source.has_depth:
            continue
        alone = {name: _weighted(s, float(name == task.name)) for name, s in config.tasks.items()}
        datasets[task.name] = item_dataset(source, split.heldout, alone, processor, config.seed + 1)
    return datasets


def _weighted(settings: Any, weight: float) -> Any:
    from dataclasses import replace

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
    return key.split(".")[0] in _SAFE_TO_CHANGE or key == "grpo.steps"


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


def _run_stages(run: Run, done: int) -> bool:
    """Runs what is left of both stages; False when a signal stopped it."""
    config = run.config
    params = None
    if done:
        meta = run.checkpoints.read_meta(done)
        run.heldout, run.seconds = meta["heldout"], meta["seconds"]
        run.progress.say(f"going on after step {done}")
    else:
        params = _start_params(run)
        _measure(run, UNTRAINED, 0, params)
    if config.sft.steps and done < config.sft.steps:
        params = _sft_stage(run, params, done)
        if params is None:
            return False
        done = config.sft.steps
    if config.grpo.steps and done < run.total:
        return _grpo_stage(run, params, done)
    return True


def _start_params(run: Run) -> Params:
    """Master weights from the config: fresh, or read in float32."""
    if run.config.model.from_scratch:
        return run.model.draw(run.layout, run.config.seed)
    run.progress.say(f"reading {run.config.model.path}")
    return run.model.load(run.layout, "float32")


def _sft_stage(run: Run, params: Params | None, done: int) -> Params | None:
    settings = run.config.sft
    optimizer = make_optimizer(run.config.optim, settings, settings.steps)
    loss = SftLoss(run.model.config, run.compute)
    state = new_state(optimizer, _start_params(run) if params is None else params)
    if done:
        state, _ = run.checkpoints.restore(done, state)
    rates = learning_rate(settings, settings.steps)

    def step(number: int, state: TrainState, batch: Batch) -> tuple[TrainState, dict, None]:
        start = time.perf_counter()
        whole = response_batch(batch, run.processor, run.config.rollout.limit)
        rows = settings.micro_prompts // jax.process_count()
        micro = [
            run.layout.put_batch(take_rows(whole, first, rows))
            for first in range(0, len(batch.items), rows)
        ]
        rate = float(rates(number))
        state, metrics = train_step(loss, optimizer, state, micro)
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - start
        tokens = int(batch.prompts.length.sum() + whole.length.sum())
        return (
            state,
            metrics
            | prompt_metrics(batch)
            | {
                "optim/learning_rate": rate,
                "response/length_mean": float(whole.length.mean()),
                "perf/update_seconds": seconds,
                "perf/tokens_per_second": tokens / seconds,
            },
            None,
        )

    state = _loop(run, SFT, settings, state, done, 0, step)
    return None if state is None else state.params


def _grpo_stage(run: Run, params: Params | None, done: int) -> bool:
    config, settings = run.config, run.config.grpo
    first = config.sft.steps
    if params is None:
        params = _start_params(run)
        if first:
            params = run.checkpoints.restore_params(first, params)
    reference = _copy(params, config.model.dtype) if settings.kl_coefficient else None
    updates = settings.steps * settings.updates
    optimizer = make_optimizer(config.optim, settings, updates)
    state = new_state(optimizer, params)
    if done > first:
        state, _ = run.checkpoints.restore(done, state)
    grpo = Grpo(
        settings,
        config.rollout,
        run.engine,
        GrpoLoss(
            run.model.config,
            run.compute,
            settings.temperature,
            settings.clip_low,
            settings.clip_high,
            settings.dual_clip,
            settings.kl_coefficient,
        ),
        optimizer,
        run.layout,
        run.processor,
        reference,
    )
    rates = learning_rate(settings, updates)
    key = jax.random.key(config.seed)

    def step(number: int, state: TrainState, batch: Batch) -> tuple[TrainState, dict, Scored]:
        rate = float(rates(number * settings.updates))
        state, metrics, scored = grpo.step(state, batch, jax.random.fold_in(key, number))
        return state, metrics | {"optim/learning_rate": rate}, scored

    return _loop(run, GRPO, settings, state, done, first, step) is not None


def _copy(params: Params, dtype: str) -> Params:
    return jax.jit(lambda p: cast(jax.tree.map(lambda x: x + 0, p), dtype))(params)


def _loop(
    run: Run,
    stage: str,
    settings: SftSettings | GrpoSettings,
    state: TrainState,
    done: int,
    first: int,
    step,
) -> TrainState | None:
    """Steps of one stage: data, step, metrics, rollouts, checkpoint, report.

    Args:
      run: the run.
      stage: its name in the metrics.
      settings: the stage's section.
      state: where training stands.
      done: steps done in the whole run.
      first: steps before this stage.
      step: `(number in the stage, state, batch) -> (state, metrics, scored rollout or None)`.

    Returns:
      The last state, or None when a signal stopped the run.
    """
    last = first + settings.steps
    pipeline = _pipeline(run, stage, settings, start=done - first)
    run.progress.start(stage, settings.steps, done - first)
    begun = time.perf_counter()
    for number in range(done + 1, last + 1):
        waited = time.perf_counter()
        batch = next(pipeline)
        waited = time.perf_counter() - waited
        if number == done + 1:
            run.progress.say(f"compiling the programs of {stage} (first step)")
        started = time.perf_counter()
        state, metrics, scored = step(number - first - 1, state, batch)
        metrics |= memory() | {
            "perf/step_seconds": time.perf_counter() - started + waited,
            "perf/input_wait_seconds": waited,
            "perf/compilations": float(run.compilations.count),
        }
        _count_bad(run, batch)
        _check_skipped(run, number, state)
        due = run.config.eval.every and (number - first) % run.config.eval.every == 0
        if number == last or (stage == GRPO and due):
            metrics |= _heldout_metrics(_measure(run, stage, number, state.params))
        run.metrics.write(stage, number, metrics)
        run.progress.step(number - first, metrics)
        _log(run, number, first, batch, scored)
        stop = run.preemption.requested
        if number == last or (number - first) % run.config.checkpoint.every == 0 or stop:
            elapsed = time.perf_counter() - begun + run.seconds.get(stage, 0.0)
            _save(run, number, state, run.seconds | {stage: round(elapsed, 2)})
            if number == last:
                run.seconds[stage] = round(elapsed, 2)
        if stop and number < run.total:
            run.checkpoints.wait()
            run.progress.say(f"stopped after step {number}; the same command goes on from here")
            return None
    return state


def _pipeline(run: Run, stage: str, settings: SftSettings | GrpoSettings, start: int):
    seed = run.config.seed * 2 + (stage == GRPO)
    items = item_dataset(run.source, run.split.train, run.config.tasks, run.processor, seed)
    return batches(
        items,
        settings.prompts,
        settings.micro_prompts,
        run.collate,
        start=start,
        threads=run.config.data.threads,
        process=jax.process_index(),
        processes=jax.process_count(),
    )


def _count_bad(run: Run, batch: Batch) -> None:
    """Names the first unusable pictures, and stops when there are too many."""
    for item in batch.items:
        bad = [skip for skip in item.skipped if skip.bad]
        for skip in bad:
            if run.bad < 10:
                run.progress.say(f"skipped {skip.name}: {skip.reason}")
            run.bad += 1
        run.tried += 1 + len(bad)
    if run.tried >= 20 and run.bad > run.config.data.max_bad_share * run.tried:
        raise UserError(
            f"{run.bad} of {run.tried} pictures from {run.source.spec} could not be used: "
            "mend the source, or raise data.max_bad_share."
        )


def _check_skipped(run: Run, number: int, state: TrainState) -> None:
    skipped = int(state.skipped)
    if skipped >= run.config.optim.max_skipped:
        _save(run, number, state, run.seconds)
        run.checkpoints.wait()
        raise UserError(
            f"{skipped} optimizer steps in a row had a non-finite gradient (step {number} is saved): "
            "lower the learning rate or look at the data."
        )


def _measure(run: Run, stage: str, number: int, params: Params) -> Table:
    if not run.evaluation.items:
        run.progress.say("no picture is held out, so there are no held-out figures")
        return {}
    run.progress.say(f"measuring held-out pictures ({stage}, step {number})")
    start = time.perf_counter()
    run.heldout[stage] = run.evaluation.measure(params, run.config.trained_tasks, run.config.seed)
    spent = run.seconds.get("heldout", 0.0) + time.perf_counter() - start
    run.seconds["heldout"] = round(spent, 2)
    if number == 0:
        run.metrics.write(
            SFT if run.config.sft.steps else GRPO, 0, _heldout_metrics(run.heldout[stage])
        )
    return run.heldout[stage]


def _heldout_metrics(table: Table) -> dict[str, float]:
    return {
        f"heldout/{task}/{name}": value
        for task, row in table.items()
        for name, value in row.items()
        if name != "count"
    }


def _save(run: Run, number: int, state: TrainState, seconds: dict[str, float]) -> None:
    run.checkpoints.save(number, state, {"heldout": run.heldout, "seconds": seconds})


def _log(run: Run, number: int, first: int, batch: Batch, scored: Scored | None) -> None:
    log = run.config.log
    if scored is not None and log.rollouts_every and (number - first) % log.rollouts_every == 0:
        write_rollouts(run.workdir, number, list(_rollout_rows(batch, scored, log.rollouts_count)))
    if number % log.report_every == 0:
        _write_report(run)


def _rollout_rows(batch: Batch, scored: Scored, count: int) -> Iterator[dict[str, Any]]:
    rollout = scored.rollout
    for b, item in enumerate(batch.items[:count]):
        example = item.example
        yield {
            "task": example.task,
            "kind": example.kind,
            "question": example.question,
            "answer": example.answer,
            "images": [np.asarray(image) for image in example.images],
            "source": example.source,
            "responses": [
                {
                    "text": scored.texts[b][g],
                    "reward": reward.overall,
                    "accuracy": reward.accuracy,
                    "format": reward.format,
                    "advantage": float(scored.advantage[b, g]),
                    "length": int(rollout.length[b, g]),
                    "finished": bool(rollout.finished[b, g]),
                }
                for g, reward in enumerate(scored.rewards[b])
            ],
        }


def _write_report(run: Run) -> None:
    write_report(run.workdir, to_dict(run.config), run.config.name)


def _finish(run: Run) -> None:
    """Leaves the summary, the report and the exported model, and prints the table."""
    run.progress.stop()
    config = run.config
    summary = {
        "heldout": run.heldout,
        "trained": list(config.trained_tasks),
        "seconds": run.seconds,
        "seed": config.seed,
    }
    (run.workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    target = run.workdir / "export"
    if not target.exists():
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            models.abstract_params(run.model.config),
            run.layout.params(run.model.config),
        )
        params = run.checkpoints.restore_params(run.checkpoints.latest(), like)
        models.export(run.model, params, target, config.model.dtype)
    _write_report(run)
    if run.heldout:
        run.progress.table(run.heldout, config.trained_tasks)
    run.progress.say(
        f"done: {target} is the trained model, {run.workdir / 'report.html'} the report"
    )
    run.metrics.close()
    run.checkpoints.close()
