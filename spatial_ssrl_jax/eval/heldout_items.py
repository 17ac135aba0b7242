"""The held-out items of the pretext tasks: of a run's evaluation, and as a benchmark."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import grain

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.items import Item, NoExample, item_dataset
from spatial_ssrl_jax.data.processor import Processor, PromptSize
from spatial_ssrl_jax.data.sources import AnySource
from spatial_ssrl_jax.data.split import split_records
from spatial_ssrl_jax.data.task_sources import task_sources
from spatial_ssrl_jax.eval.benchmarks.pretext import PRETEXT, question_of
from spatial_ssrl_jax.eval.benchmarks.registry import Benchmark
from spatial_ssrl_jax.tasks.example import Tasks


def task_datasets(
    source: AnySource,
    pool: Sequence[int],
    tasks: Tasks,
    processor: Processor,
    seed: int,
    limit: PromptSize | None = None,
) -> dict[str, grain.MapDataset]:
    """A dataset of each task alone, over the records `pool` of a source; see `item_dataset`.

    Tasks for which none of the records can serve are left out.
    """
    datasets = {}
    for task, settings in tasks.items():
        if not task_sources(source, pool, task, settings):
            continue
        alone = {other: replace(s, weight=float(other is task)) for other, s in tasks.items()}
        datasets[task.name] = item_dataset(source, pool, alone, processor, seed, limit)
    return datasets


def open_pretext(
    source: AnySource, processor: Processor, count: int, heldout_fraction: float, seed: int
) -> Benchmark:
    """The tasks as a benchmark: the held-out questions of a training run with these options and the
    tasks' default settings, where its buckets hold them all.

    Args:
      source: of images or of questions.
      processor: measures prompts.
      count: questions a task.
      heldout_fraction: of the images; the same as in the run.
      seed: of the run.

    Raises:
      UserError: its held-out images give no question.
    """
    pool = split_records(source, heldout_fraction).heldout
    datasets = task_datasets(source, pool, Config("pretext").task_settings, processor, seed + 1)
    questions, left_out = [], []
    for task, items in datasets.items():
        try:
            examples = [item.example for item in _first(items, count)]
        except NoExample as error:
            left_out.append(f"{task}: {error.cause}.")
            continue
        questions += [question_of(example, number) for number, example in enumerate(examples)]
    if not questions:
        reason = left_out[0] if left_out else "none is held out"
        raise UserError(
            f"the held-out images of {source.spec} give no question ({reason.rstrip('.')}): use "
            "another --source, or raise --heldout-fraction."
        )
    return Benchmark(PRETEXT, tuple(questions), tuple(left_out))


def heldout_items(
    datasets: dict[str, grain.MapDataset],
    count: int,
    trained: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, list[Item]]:
    """The first `count` items of each task's held-out stream.

    A task for which no record is held out, or none that gives an example, is left out.

    Args:
      datasets: by task; see `task_datasets`.
      count: items a task.
      trained: names of the tasks that should have held-out items.
      say: receives why one of them, or one that has records, is left out.
    """
    found, more = {}, "raise data.heldout_fraction"
    for task, items in datasets.items():
        try:
            found[task] = _first(items, count)
        except NoExample as error:
            say(f"no held-out metrics of {task}, as {error.cause}: {more}, or use other images")
    lacking = [task for task in trained if task not in datasets]
    if not datasets:
        say(f"no image is held out, so there are no held-out metrics: {more}")
    elif lacking:
        say(f"no held-out metrics of {', '.join(lacking)}, as no record is held out: {more}")
    return found


def _first(items: grain.MapDataset[Item], count: int) -> list[Item]:
    """The first `count` items of an endless stream, none of which is empty."""
    return [item for i in range(count) if (item := items[i]) is not None]
