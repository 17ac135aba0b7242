"""Training: the stages of a run and their loop over steps, from the start or a checkpoint."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from inspect import unwrap

import numpy as np
import optax
from etils import epath

from spatial_ssrl_jax.checkpoint.export import export, export_adapter
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError, explain_write_errors
from spatial_ssrl_jax.common.paths import user_path, write_atomic
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.monitoring.process_stats import Compiled, describe_programs, memory_metrics
from spatial_ssrl_jax.monitoring.progress import Progress
from spatial_ssrl_jax.parallel.collectives import all_gather, all_sum, barrier, is_primary
from spatial_ssrl_jax.parallel.watchdog import Watchdog
from spatial_ssrl_jax.perf.mfu import mfu_metrics
from spatial_ssrl_jax.qwen_vl.param_tree import Params
from spatial_ssrl_jax.rl.logprobs import logprobs_of, vision_features
from spatial_ssrl_jax.rl.stages import GrpoStage, SftStage, Stage, stages
from spatial_ssrl_jax.rl.train_step import TrainState, micro_gradients
from spatial_ssrl_jax.rollout.decode import decode_chunk, prefill
from spatial_ssrl_jax.trainer.bad_records import check_bad_fraction
from spatial_ssrl_jax.trainer.context import (
    Run,
    newest_step,
    open_run,
    pipeline,
)
from spatial_ssrl_jax.trainer.initial_state import StageInitializer
from spatial_ssrl_jax.trainer.memory import explain_out_of_memory, memory_advice
from spatial_ssrl_jax.trainer.preemption import Preemption
from spatial_ssrl_jax.trainer.run_log import Sampled, log_step, refresh_report
from spatial_ssrl_jax.trainer.stage_steps import Step, grpo_step, sft_step
from spatial_ssrl_jax.trainer.validation import validate

UNTRAINED = "untrained"  # the held-out table's name for the model before training
# The jitted functions that run the model's layers; other programs are small.
_MODEL_PROGRAMS = tuple(
    unwrap(program).__name__
    for program in (prefill, decode_chunk, vision_features, logprobs_of, micro_gradients)
)
_NAMED = 10  # unusable images that are reported by name; the others are only counted


def train(config: Config, workdir: epath.PathLike, overwrite: bool = False) -> bool:
    """Trains to the end, or until a signal requests a stop.

    Args:
      config: the run.
      workdir: the run's folder, here or in a bucket; a run that stopped there resumes.
      overwrite: empty the folder first.

    Returns:
      True when the run is complete, False when it stopped early with its state saved.

    Raises:
      UserError: an error that the user can fix.
    """
    workdir = user_path(workdir)
    with (
        Preemption() as preemption,
        Watchdog(config.mesh) as watch,
        Progress(quiet=not is_primary()) as progress,
        explain_write_errors(workdir),
        ExitStack() as resources,
    ):
        preemption.say, progress.on_progress = progress.say, watch.beat
        progress.doing("opening the model and the images")
        run = open_run(config, workdir, overwrite, preemption, progress, resources)
        start = StageInitializer(config, run.model, run.layout, run.checkpoints, progress.say)
        try:
            with explain_out_of_memory(memory_advice(config)):
                finished = _run_stages(run, start, newest_step(run))
        except Exception:
            run.checkpoints.settle()
            _close(run)
            raise
        run.checkpoints.wait()
        if finished:
            _finish(run, start)
        elif run.metrics is not None:
            refresh_report(run)
        _close(run)
        barrier("the end")  # no process ends before the primary has written all files
        return finished


def _close(run: Run) -> None:
    """Ends compiling ahead, and closes the metric writers.

    Their errors are ignored, since the run's outcome is reported.
    """
    run.ahead.close()
    run.engine.queue.close()
    if run.metrics is not None:
        with suppress(Exception):
            run.metrics.close()


def _run_stages(run: Run, start: StageInitializer, done: int) -> bool:
    """Runs the remaining steps of the stages; False when a signal stopped the run."""
    if done:
        run.state.restore(run.checkpoints.read_meta(done))
        run.progress.say(f"resuming after step {done}")
    for stage in stages(run.config):
        if done < stage.last_step:
            if _stop_requested(run, done) or not _run_stage(run, start, stage, done):
                return False
            done = stage.last_step
    return True


def _run_stage(run: Run, start: StageInitializer, stage: SftStage | GrpoStage, done: int) -> bool:
    """Runs a stage after the run's step `done`; False when a signal stopped it."""
    optimizer = stage.optimizer(run.config)
    state = _begin(run, start, stage, optimizer, done)
    if isinstance(stage, SftStage):
        step = sft_step(run, stage, optimizer)
    else:
        step = grpo_step(run, stage, optimizer, _reference(start, stage, state, done))
    return _loop(run, stage, step, state, done)


def _begin(
    run: Run,
    start: StageInitializer,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    done: int,
) -> TrainState:
    """A stage's state, new or after step `done`; measures the model before the run's first step."""
    run.progress.on_progress()
    if done > stage.start_step:
        return start.restored(stage, optimizer, done)
    params = start.params(stage)
    if done == 0:
        metrics, _ = validate(run, UNTRAINED, 0, params)
        if run.metrics is not None and metrics:
            run.metrics.write(stage.name, 0, metrics)
    return start.state(stage, optimizer, params)


def _reference(
    start: StageInitializer, stage: GrpoStage, state: TrainState, done: int
) -> Params | None:
    """The KL's reference: the weights that the stage starts from; None without KL."""
    if not stage.settings.kl_coef:
        return None
    return start.reference(stage, state, fresh=done == stage.start_step)


def _loop(run: Run, stage: SftStage | GrpoStage, step: Step, state: TrainState, done: int) -> bool:
    """The stage's steps after the run's step `done`; False when a signal stopped the run."""
    if _stop_requested(run, done):
        return False
    first = done + 1
    with closing(pipeline(run, stage, start=done - stage.start_step)) as stream:
        run.progress.start(stage.name, stage.settings.steps, done - stage.start_step)
        begun = time.perf_counter() - run.state.seconds.get(stage.name, 0.0)
        for number in range(first, stage.last_step + 1):
            if number == first:
                run.progress.doing(f"compiling the programs of {stage.name} (first step)")
            compiled = run.compilations.programs
            state, metrics, sampled, batch = _timed_step(
                run, step, number - stage.start_step - 1, state, stream
            )
            _say_compiled(run, number, compiled)
            _count_bad(run, batch)
            measured, is_best = _validate_step(run, stage, number, state)
            _log_step(run, stage, number, metrics | measured, sampled)
            run.state.seconds[stage.name] = round(time.perf_counter() - begun, 2)
            _count_skipped(run, stage, number, metrics, state)
            stop = _signalled(run)
            if is_best or stop or _save_due(run, stage, number):
                _save(run, stage, number, state)
            if stop and number < run.total:
                run.checkpoints.wait()
                _report_stop(run, number)
                return False
    return True


def _say_compiled(run: Run, number: int, before: dict[str, Compiled]) -> None:
    """Says which programs were compiled in a step."""
    programs = run.compilations.programs
    if programs != before:
        run.progress.say(f"step {number} compiled {describe_programs(programs, before)}")


def _timed_step(
    run: Run, step: Step, number: int, state: TrainState, stream: Iterator[Batch]
) -> tuple[TrainState, dict[str, float], Sampled | None, Batch]:
    """Reads a batch and makes a step; adds times, memory, MFU and compilations to its metrics."""
    run.gap.take()
    run.gap.begin()  # each step, and what is measured between two, has waited for its results
    begun = time.perf_counter()
    batch = next(stream)
    waited = float(all_gather(np.array([time.perf_counter() - begun])).max())  # for the slowest
    state, metrics, sampled = step(number, state, batch)
    seconds, compiled = time.perf_counter() - begun, run.compilations.waited
    metrics |= memory_metrics() | mfu_metrics(metrics["perf/useful_flops"], seconds)
    metrics |= {
        "perf/step_seconds": seconds,
        "perf/input_wait_seconds": waited,
        "perf/compilations": float(compiled.count),
        "perf/compile_seconds": compiled.seconds,
        "perf/compilations_read": float(compiled.read),
        "perf/host_gap_seconds": run.gap.take(),
        "perf/model_programs": float(run.compilations.count(_MODEL_PROGRAMS)),
    }
    return state, metrics, sampled, batch


def _validate_step(
    run: Run, stage: Stage, number: int, state: TrainState
) -> tuple[dict[str, float], bool]:
    """The measurements that are due, and whether the step is the best so far.

    SFT is measured at its end alone.
    """
    if number == stage.last_step:
        return validate(run, stage.name, number, state.params)
    if isinstance(stage, SftStage):
        return {}, False
    return validate(run, stage.name, number, state.params, number - stage.start_step)


def _log_step(
    run: Run, stage: Stage, number: int, metrics: dict[str, float], sampled: Sampled | None
) -> None:
    """Writes and shows a step's metrics; other processes only tell the watchdog."""
    if run.metrics is not None:
        run.metrics.write(stage.name, number, metrics)
        run.progress.step(number - stage.start_step, metrics)
        log_step(run, number, stage.start_step, sampled)
    run.progress.on_progress()


def _save_due(run: Run, stage: Stage, number: int) -> bool:
    every = run.config.checkpoint.every
    return number == stage.last_step or (number - stage.start_step) % every == 0


def _signalled(run: Run) -> bool:
    """Whether any of the processes has received a signal."""
    return all_sum(run.preemption.requested) > 0


def _stop_requested(run: Run, done: int) -> bool:
    """Whether to stop before a step, where there is nothing to save; reports it."""
    stop = _signalled(run)
    if stop:
        _report_stop(run, done)
    return stop


def _report_stop(run: Run, done: int) -> None:
    run.progress.say(f"stopped after step {done}; the same command resumes from here")


def _count_bad(run: Run, batch: Batch) -> None:
    """Reports the first unusable images; raises a `UserError` when there are too many."""
    skips = [skip for item in batch.items for skip in item.skipped if skip.bad]
    for skip in skips[: max(0, _NAMED - run.state.bad)]:
        run.progress.say(f"skipped {skip.name}: {skip.reason}")
    run.state.bad += round(all_sum(len(skips)))
    run.state.tried += round(all_sum(len(skips) + len(batch.items)))
    check_bad_fraction(run.config, run.source.spec, run.state.bad, run.state.tried)


def _count_skipped(
    run: Run, stage: Stage, number: int, metrics: dict[str, float], state: TrainState
) -> None:
    """Counts skipped optimizer steps; saves and raises a `UserError` where nothing is learnt.

    That is after too many in a row, or at the end of a stage that made none.
    """
    run.state.skipped += round(metrics["optim/skipped"])
    in_a_row, made_any = int(state.skipped), int(state.updates) > 0
    useless = number == stage.last_step and not made_any
    if in_a_row < run.config.optim.max_skipped_steps and not (in_a_row and useless):
        return
    _save(run, stage, number, state)
    run.checkpoints.wait()
    fix = (
        "lower the learning rate or check the data"
        if made_any
        else "no step before had a finite one, so check the weights that the stage starts from, "
        "with generate --model, and the data"
    )
    raise UserError(
        f"{in_a_row} optimizer steps in a row had a non-finite gradient (step {number} is "
        f"saved): {fix}."
    )


def _save(run: Run, stage: Stage, number: int, state: TrainState) -> None:
    best = run.state.best.step if run.state.best else None
    run.checkpoints.save(number, stage.name, state, run.state.as_meta(), best)


def _finish(run: Run, start: StageInitializer) -> None:
    """Writes the summary, the report and the exported model, and prints the table."""
    run.progress.stop()
    config = run.config
    summary = {
        "heldout": run.state.heldout,
        "trained": list(run.trained),
        "seconds": run.state.seconds,
        "seed": config.seed,
        "skipped_steps": run.state.skipped,
        "best": asdict(run.state.best) if run.state.best else None,
    }
    target, adapter = run.workdir / "export", run.workdir / "adapter"
    last = open_model(run.checkpoints.folder / str(run.checkpoints.latest()))
    export(last, last.load(run.layout), target, config.model.dtype)
    stage = stages(config)[-1]
    if stage.settings.lora.rank:
        base = start.base(stage)
        export_adapter(last, run.layout, adapter, base.name if base else None)
    if run.metrics is not None:
        write_atomic(run.workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
        refresh_report(run)
    if run.state.heldout:
        run.progress.table(run.state.heldout, run.trained)
    if run.state.skipped:
        run.progress.say(
            f"{run.state.skipped} optimizer steps were skipped, as their gradient was not finite"
        )
    run.progress.say(f"compiled in all: {describe_programs(run.compilations.programs, {})}")
    run.progress.say(
        f"done: {target} is the trained model, {run.workdir / 'report.html'} the report"
    )
    if run.state.best and run.state.best.step < run.total:
        run.progress.say(
            f"the best step by {run.state.best.metric} is {run.state.best.step}, kept as "
            f"{run.checkpoints.folder / str(run.state.best.step)}: convert to-hf exports it"
        )
    run.checkpoints.close()
