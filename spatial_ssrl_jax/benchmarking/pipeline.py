"""Time of the tasks for each image, and of the data pipeline for each batch."""

import dataclasses
import time
from typing import Any

import numpy as np

from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data import pipeline
from spatial_ssrl_jax.data.items import item_dataset
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.task_sources import ImageExampleMaker, task_sources
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.example import Reject, Task
from spatial_ssrl_jax.tasks.record import Record

_IMAGES = 3  # decoded before the timing, used in turn
_WARM_UP = 2  # fonts and stamps are drawn once and kept
_PIXELS = (262_144, 1_048_576)  # min and max area of a timed prompt's images


def time_tasks(spec: str | None, repeats: int) -> dict[str, dict[str, Any]]:
    """Times each task on one core, without reading or decoding images.

    Args:
      spec: where images come from; None takes built-in scenes, 1024x768 for the tasks that need
        depth and 640x480 for the others.
      repeats: examples a task.

    Returns:
      By task: `size` of the first image; `ms` (median) and `ms_p90`, CPU milliseconds of a try that
      yields an example; and `accepted`, the fraction of tries that do.

    Raises:
      UserError: `repeats` is below 1, or a task that the source has images for yields no example.
    """
    if repeats < 1:
        raise UserError("--repeats must be at least 1.")
    report = {}
    for task in TASKS:
        records = _records(
            spec or f"scenes:9:{'1024x768' if task.needs_depth else '640x480'}", task
        )
        if records:
            report[task.name] = _time_task(task, records, repeats)
    return report


def _records(spec: str, task: Task) -> list[Record]:
    """A few decoded images that a task can use; none where the source has no images for it."""
    source = open_source(spec)
    parts = [
        (part.maker.source, part.indices)
        for part in task_sources(source, range(len(source)), task, task.settings())
        if isinstance(part.maker, ImageExampleMaker)
    ]
    each = -(-_IMAGES // max(len(parts), 1))
    return [images[index] for images, indices in parts for index in indices[:each]]


def _time_task(task: Task, records: list[Record], repeats: int) -> dict[str, Any]:
    settings, spent, tries = task.settings(), [], 0
    while len(spent) < repeats + _WARM_UP and tries < 20 * (repeats + _WARM_UP):
        record, rng = records[tries % len(records)], np.random.default_rng(tries)
        tries += 1
        start = time.thread_time()  # other programs on the core do not count
        try:
            task.make(record, rng, settings)
        except Reject:
            continue
        spent.append(1e3 * (time.thread_time() - start))
    timed = spent[_WARM_UP:]
    if not timed:
        raise UserError(f"{records[0].spec} gave no {task.name} example: use other images.")
    height, width = records[0].image.shape[:2]
    return {
        "size": f"{width}x{height}",
        "ms": round(float(np.median(timed)), 2),
        "ms_p90": round(float(np.percentile(timed, 90)), 2),
        "accepted": round(len(spent) / tries, 3),
    }


def time_pipeline(
    spec: str,
    model: str,
    *,
    batch: int,
    batches: int,
    threads: int,
    workers: int,
    step_seconds: float,
) -> dict[str, Any]:
    """Takes batches as a run does, with a step of a given length in between.

    All tasks that the source has records for are mixed by the paper's weights. The first batch, for
    which workers start, is timed apart.

    Args:
      spec: where images come from, read and decoded as in a run.
      model: a model folder whose processor makes the prompts.
      batch: prompts a batch.
      batches: batches that are timed.
      threads, workers: as in the config's section `data`.
      step_seconds: length of a training step; 0 measures the pipeline alone.

    Returns:
      `images_per_s` and `prompts_per_s` of ready batches; `cpu_ms_per_prompt` of this process, so
      without its workers'; and `wait_share`, the fraction of the whole time that steps waited for
      their batch.

    Raises:
      UserError: a number is out of range.
    """
    if batches < 0 or step_seconds < 0:
        raise UserError("--batches and --step-seconds must be at least 0.")
    stream = _stream(spec, model, batch, threads, workers)
    start = time.perf_counter()
    next(stream)
    first, waits, images = time.perf_counter() - start, [], 0
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        waiting = time.perf_counter()
        ready = next(stream)
        waits.append(time.perf_counter() - waiting)
        images += sum(len(item.example.images) for item in ready.items)
        time.sleep(step_seconds)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    stream.close()
    return {
        "source": spec,
        "batch": batch,
        "threads": threads,
        "workers": workers,
        "first_batch_seconds": round(first, 2),
        "prompts_per_s": round(batch * batches / seconds, 2),
        "images_per_s": round(images / seconds, 2),
        "cpu_ms_per_prompt": round(1e3 * cpu / max(batch * batches, 1), 2),
        "step_seconds": step_seconds,
        "wait_share": round(sum(waits) / seconds, 3),
    }


def _stream(spec: str, model: str, batch: int, threads: int, workers: int):
    """Batches of all tasks that the source has records for."""
    if min(batch, threads) < 1 or workers < 0:
        raise UserError("--batch and --threads must be at least 1, and --workers at least 0.")
    source, folder = open_source(spec), open_model(model)
    processor = Processor(folder.files, folder.config, *_PIXELS)
    pool, settings = range(len(source)), dict(Config("bench").task_settings)
    for task in settings:
        if not task_sources(source, pool, task, settings[task]):
            settings[task] = dataclasses.replace(settings[task], weight=0.0)
    items = item_dataset(source, pool, settings, processor, seed=0)
    return pipeline.batches(
        items,
        batch,
        batch,
        start=0,
        threads=threads,
        workers=workers,
        process=0,
        processes=1,
    )
