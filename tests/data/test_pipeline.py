"""The pipeline: one stream whatever the threads and processes, disjoint records, skips by name."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data import pipeline
from spatial_ssrl_jax.data.items import TOO_LONG, NoExample, check_fits, item_dataset
from spatial_ssrl_jax.data.pipeline import Batch, batches, repeated
from spatial_ssrl_jax.data.processor import Processor, Prompt, PromptSize
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.sources.scenes import SceneSource
from spatial_ssrl_jax.data.split import split_records
from spatial_ssrl_jax.rl.sft import encode_responses
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.example import Tasks
from spatial_ssrl_jax.tasks.flip import QUESTION
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT
from spatial_ssrl_jax.tasks.record import Record
from tests.helpers.images import record

SCENES = open_source("scenes:40")


@pytest.fixture(scope="module")
def processor() -> Processor:
    model = open_model("tiny")
    return Processor(model.files, model.config, min_pixels=28 * 28, max_pixels=112 * 112)


def weights(**given: float) -> Tasks:
    tasks = Config("test").task_settings
    return {t: dataclasses.replace(s, weight=given.get(t.name, 0.0)) for t, s in tasks.items()}


def take(iterator, count: int) -> list[Batch]:
    return [next(iterator) for _ in range(count)]


@pytest.fixture(scope="module")
def stream(processor: Processor):
    """Batches of 4 in updates of 2 over flip and shuffle; keywords change the arguments."""
    items = item_dataset(SCENES, range(40), weights(flip=1.0, shuffle=2.0), processor, seed=5)

    made = []

    def make(**changed):
        arguments = {"start": 0, "threads": 1, "process": 0, "processes": 1} | changed
        epoch = changed.get("epoch")
        made.append(batches(repeated(items, epoch, 5) if epoch else items, 4, 2, **arguments))
        return made[-1]

    yield make
    for batch_stream in made:
        batch_stream.close()


def words(batch: Batch) -> list[tuple]:
    return [(item.example.source["record"], item.example.question) for item in batch.items]


def assert_same(a: Batch, b: Batch) -> None:
    assert words(a) == words(b)
    assert np.array_equal(a.index, b.index)
    for pair in zip(a.prompts, b.prompts, strict=True):
        for field in dataclasses.fields(Prompt):
            np.testing.assert_array_equal(*(getattr(prompt, field.name) for prompt in pair))


def test_threads_do_not_change_the_stream(stream):
    for a, b in zip(take(stream(threads=1), 3), take(stream(threads=4), 3), strict=True):
        assert_same(a, b)


def test_the_stream_keeps_changing(stream):
    found = [word for batch in take(stream(), 5) for word in words(batch)]
    assert len(set(found)) > 15


def test_processes_divide_every_batch_and_every_update(stream):
    whole = take(stream(), 3)
    parts = [take(stream(process=p, processes=2), 3) for p in range(2)]
    for step, batch in enumerate(whole):
        rows = {}
        for part in parts:
            place = part[step].index
            assert len(place) == 2 and sorted(place // 2) == [0, 1]  # one row of each update
            for row, word in enumerate(words(part[step])):
                rows[int(place[row])] = word, part[step].prompts[row].ids
        assert sorted(rows) == [0, 1, 2, 3] == batch.index.tolist()
        for place, (word, ids) in rows.items():
            assert word == words(batch)[place]
            assert np.array_equal(ids, batch.prompts[place].ids)


def test_a_start_at_k_equals_skipping_k(stream):
    skipped = take(stream(), 5)[3:]
    for a, b in zip(take(stream(start=3, threads=2), 2), skipped, strict=True):
        assert_same(a, b)


def test_an_epoch_has_each_example_once_and_ends_with_a_part_of_a_batch(stream):
    steps = take(stream(epoch=10), 6)
    assert [len(batch.items) for batch in steps] == [4, 4, 2, 4, 4, 2]
    first, second = ([word for batch in steps[k : k + 3] for word in words(batch)] for k in (0, 3))
    plain = [word for batch in take(stream(), 3) for word in words(batch)][:10]
    assert sorted(first) == sorted(second) == sorted(plain) and first != second
    for a, b in zip(take(stream(epoch=10, start=2), 3), steps[2:], strict=False):
        assert_same(a, b)
    parts = [take(stream(epoch=10, process=p, processes=2), 3) for p in range(2)]
    for step in range(3):
        both = [parts[p][step] for p in range(2)]
        assert len({len(part.items) for part in both}) == 1
        pairs = [pair for part in both for pair in zip(part.index, words(part), strict=True)]
        assert [word for _, word in sorted(pairs)] == words(steps[step])


def test_an_epochs_last_batch_divides_over_the_processes(stream):
    with pytest.raises(
        UserError, match="the last 1 of 9 examples .* over 2 processes: set sft.examples=8"
    ):
        stream(epoch=9, process=0, processes=2)


@settings(deadline=None, max_examples=6)
@given(start=st.integers(0, 10_000), threads=st.integers(1, 4), processes=st.sampled_from([1, 2]))
def test_a_resume_anywhere_gives_the_same_step(stream, start: int, threads: int, processes: int):
    """The state is the number of the next step; the number of processes does not matter."""
    (whole,) = take(stream(start=start), 1)
    for process in range(processes):
        arguments = {"start": start, "threads": threads, "process": process, "processes": processes}
        (part,) = take(stream(**arguments), 1)
        assert words(part) == [words(whole)[place] for place in part.index]
        for prompt, place in zip(part.prompts, part.index, strict=True):
            np.testing.assert_array_equal(prompt.ids, whole.prompts[place].ids)


def test_worker_processes_do_not_change_the_stream(stream):
    for a, b in zip(take(stream(start=2), 3), take(stream(start=2, workers=2), 3), strict=True):
        assert_same(a, b)


def test_a_killed_worker_is_a_sentence(stream):
    """It is killed while it writes: a prompt is larger than what a pipe holds."""
    known, files = set(multiprocessing.active_children()), set(os.listdir("/dev/shm"))
    batches = stream(workers=1)
    (worker,) = set(multiprocessing.active_children()) - known
    take(batches, 1)
    assert set(os.listdir("/dev/shm")) <= files  # containers have 64 MB of it
    worker.kill()
    for _ in range(2):  # it does not come back
        with pytest.raises(UserError, match=r"was killed \(exit code -9.*lower data\.workers"):
            take(batches, 100)


def test_closing_waits_for_no_worker(stream):
    """It may be held back by a pipe that nobody reads, and would be so for ever."""
    known = set(multiprocessing.active_children())
    batches = stream(workers=1)
    (worker,) = set(multiprocessing.active_children()) - known
    take(batches, 1)
    start = time.monotonic()
    batches.close()
    worker.join()
    assert time.monotonic() - start < 5


def test_an_error_of_a_worker_is_that_of_its_rows(processor: Processor):
    source = Damaged(open_source("scenes:2"), bad=(0, 1))
    items = item_dataset(source, range(2), weights(flip=1.0), processor, seed=0)
    failing = batches(items, 2, 2, start=0, threads=1, workers=1, process=0, processes=1)
    with pytest.raises(NoExample, match="has no valid flip example.*is truncated") as found:
        next(failing)
    failing.close()
    assert "in random_map" in "".join(found.value.__notes__)  # where it was raised


class Odd(Exception):
    """It pickles, and cannot be read again."""

    def __init__(self, code: int, text: str):
        super().__init__(text)


def test_an_error_that_does_not_pickle_comes_as_its_text():
    error = pickle.loads(pipeline._pickled(Odd(3, "The disk is full.")))
    assert isinstance(error, RuntimeError) and "The disk is full" in str(error)


PARENT = """
import multiprocessing, sys, time
from spatial_ssrl_jax.common.processes import end_with_parent

def work():
    end_with_parent()
    time.sleep(60)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work, daemon=True)
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def test_a_worker_ends_with_its_parent(tmp_path: Path):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(3)  # for it to start
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while is_running(worker):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def test_a_seed_of_its_own_gives_a_stream_of_its_own(processor: Processor):
    first, second = (
        item_dataset(SCENES, range(40), weights(flip=1.0), processor, seed=seed)[0].example
        for seed in (1, 2)
    )
    assert (first.source, first.question) != (second.source, second.question)


def test_each_task_has_an_order_of_its_own(processor: Processor):
    def order(task: str) -> list[str]:
        items = item_dataset(SCENES, range(40), weights(**{task: 1.0}), processor, seed=5)
        return [items[i].example.source["record"] for i in range(20)]

    assert order("flip") != order("shuffle")


def test_replacements_are_drawn_from_the_whole_pool(processor: Processor):
    """Every second image is bad; others than one take their places."""
    damaged = Damaged(open_source("scenes:12"), bad=tuple(range(0, 12, 2)))
    items = item_dataset(damaged, range(12), weights(flip=1.0), processor, seed=0)
    found = [items[i] for i in range(12)]
    replaced = [item.example.source["record"] for item in found if item.skipped]
    assert len(replaced) == 6 and len(set(replaced)) > 2


def test_tasks_come_in_proportion_to_their_weights(processor: Processor):
    items = item_dataset(SCENES, range(40), weights(flip=1.0, shuffle=3.0), processor, seed=0)
    names = [items[i].example.task for i in range(40)]
    assert names.count("shuffle") == 30 and names.count("flip") == 10


def test_the_number_of_processes_divides_an_update(stream):
    with pytest.raises(UserError, match="2 prompts of an optimizer step do not divide over 4 proc"):
        stream(processes=4)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.9])
def test_held_out_and_training_records_are_disjoint_and_all(fraction: float):
    split = split_records(SCENES, fraction)
    assert not set(split.train) & set(split.heldout)
    assert sorted(split.train + split.heldout) == list(range(40))
    assert (len(split.heldout) > 0) == (fraction > 0)


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_the_fraction_is_that_of_many_records(fraction: float):
    split = split_records(open_source("scenes:20000"), fraction)
    assert len(split.heldout) == pytest.approx(20000 * fraction, rel=0.05)


def test_an_image_never_changes_sides(tmp_path: Path):
    """However many images are added or removed, and whatever fraction is chosen above its own."""
    names = [f"{number:03d}.jpg" for number in range(300)]
    for name in names:
        (tmp_path / name).touch()

    def heldout(fraction: float) -> set[str]:
        source = open_source(f"folder:{tmp_path}")
        return {source.name(i) for i in split_records(source, fraction).heldout}

    whole = heldout(0.1)
    assert 15 < len(whole) < 45 and whole < heldout(0.2)
    for name in names[:150]:
        (tmp_path / name).unlink()
    assert heldout(0.1) == whole - set(names[:150])
    (tmp_path / "000a.jpg").touch()
    assert heldout(0.1) - {"000a.jpg"} == whole - set(names[:150])


def test_no_image_left_for_training_is_an_error():
    with pytest.raises(UserError, match=r"heldout_fraction=0\.9999999 leaves no image"):
        split_records(open_source("scenes:1"), 0.9999999)


def test_only_the_pool_is_drawn_from(processor: Processor):
    split = split_records(SCENES, 0.5)
    items = item_dataset(SCENES, split.train, weights(flip=1.0), processor, seed=0)
    seen = {items[i].example.source["record"] for i in range(60)}
    assert seen == {SCENES.name(i) for i in split.train}


@dataclass(frozen=True)
class Damaged:
    """Scenes of which some cannot be read."""

    scenes: SceneSource
    bad: tuple[int, ...]
    spec: str = "folder:damaged"
    has_depth: bool = False
    has_distances: bool = False

    def __len__(self) -> int:
        return len(self.scenes)

    def name(self, index: int) -> str:
        return self.scenes.name(index)

    def size(self, index: int) -> tuple[int, int]:
        return self.scenes.size(index)

    def __getitem__(self, index: int) -> Record:
        if index in self.bad:
            raise BadImage(f"{self.name(index)} is truncated.")
        return self.scenes[index]


def test_a_bad_image_is_replaced_inside_its_index_and_named(processor: Processor):
    few = open_source("scenes:6")
    whole, damaged = (
        item_dataset(source, range(6), weights(flip=1.0), processor, seed=0)
        for source in (few, Damaged(few, bad=(1, 4)))
    )
    replaced = 0
    for index in range(12):
        before, item = whole[index].example.source["record"], damaged[index]
        assert item.example.source["record"] not in ("scene-000001", "scene-000004")
        if before in ("scene-000001", "scene-000004"):
            replaced += 1
            first = item.skipped[0]
            assert (first.name, first.bad) == (before, True)
            assert first.reason == f"{before} is truncated."
        else:
            assert item.skipped == () and item.example.source["record"] == before
            assert np.array_equal(item.prompt.ids, whole[index].prompt.ids)
    assert replaced == 4  # two epochs over six records, two of them bad
    again = item_dataset(Damaged(few, bad=(1, 4)), range(6), weights(flip=1.0), processor, seed=0)
    assert [again[i].skipped for i in range(12)] == [damaged[i].skipped for i in range(12)]


def test_nothing_but_bad_images_is_an_error_with_the_reason(processor: Processor):
    source = Damaged(open_source("scenes:2"), bad=(0, 1))
    items = item_dataset(source, range(2), weights(flip=1.0), processor, seed=0)
    with pytest.raises(UserError, match=r"folder:damaged has no valid flip example.*is truncated"):
        items[0]


def test_parts_of_a_mixture_come_in_proportion_to_their_weights(processor: Processor):
    source = open_source("3*scenes:30+scenes:20:56x56")
    pool = range(len(source))
    items = item_dataset(source, pool, weights(shuffle=1.0, depth=1.0), processor, seed=0)
    examples = [items[i].example for i in range(80)]
    for task in ("shuffle", "depth"):
        specs = [example.source["spec"] for example in examples if example.task == task]
        assert len(specs) == 40 and specs.count("scenes:30") == 30


@dataclass(frozen=True)
class OneLarge:
    """Scenes of which some are larger than any prompt; reading one of those fails the test."""

    large: tuple[int, ...]
    spec: str = "scenes:one-large"
    has_depth: bool = True
    has_distances: bool = True

    def __len__(self) -> int:
        return 6

    def name(self, index: int) -> str:
        return f"record-{index}"

    def size(self, index: int) -> tuple[int, int]:
        return (2000, 2000) if index in self.large else (112, 112)

    def __getitem__(self, index: int) -> Record:
        assert index not in self.large, "pixels were read"
        return open_source("scenes:6")[index]


def test_a_prompt_too_long_is_dropped_before_its_pixels_are_read():
    model = open_model("tiny")
    processor = Processor(model.files, model.config, min_pixels=28 * 28, max_pixels=2000 * 2000)
    items = item_dataset(
        OneLarge(large=(2, 3)), range(6), weights(flip=1.0), processor, 0, PromptSize(256, 512)
    )
    dropped = [skip for i in range(12) for skip in items[i].skipped]
    assert {skip.name for skip in dropped} == {"record-2", "record-3"} and len(dropped) >= 4
    assert all(skip.reason == TOO_LONG and not skip.bad for skip in dropped)


def test_the_question_counts_too(processor: Processor):
    length = processor.measure([(112, 112)], f"{QUESTION} {FORMAT_PROMPT}").tokens
    for limit, fits in ((length, True), (length - 1, False)):
        items = item_dataset(
            SCENES, range(4), weights(flip=1.0), processor, 0, PromptSize(limit, 512)
        )
        if fits:
            assert items[0].skipped == () and len(items[0].prompt.ids) == limit
        else:
            with pytest.raises(UserError, match="no valid flip example.*data.prompt_buckets"):
                items[0]


def test_buckets_that_hold_no_prompt_are_refused_beforehand(processor: Processor):
    """From sizes alone, of images and of the text that every prompt has."""
    smallest = processor.measure([(112, 112)], FORMAT_PROMPT)
    fits = partial(check_fits, SCENES, range(4), weights(flip=1.0), processor)
    fits(PromptSize(smallest.tokens, smallest.patches))
    message = (
        f"no flip prompt .* takes {smallest.tokens} and {smallest.patches}.*data.prompt_buckets"
    )
    for limit in (PromptSize(smallest.tokens - 1, 512), PromptSize(9999, smallest.patches - 1)):
        with pytest.raises(UserError, match=message):
            fits(limit)


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
@pytest.mark.parametrize("size", [(112, 112), (97, 160), (224, 150)])
def test_the_sizes_of_a_tasks_images_are_known_beforehand(task, size):
    rec = record(2, *size)
    example = task.make(rec, np.random.default_rng(0), task.settings())
    known = task.sizes(size, task.settings())
    assert len(known) == len(example.images)
    for (height, width), image in zip(known, example.images, strict=True):
        assert 0 <= height - image.shape[0] <= 3 and 0 <= width - image.shape[1] <= 3


def test_released_responses_are_learned_from_as_they_are(processor: Processor, tmp_path: Path):
    Image.fromarray(record(1).image).save(tmp_path / "a.png")
    output = "<think>By the edges.</think>\\boxed{2-0}"
    row = {"instruction": QUESTION, "input": "", "output": output, "images": ["a.png"]}
    (tmp_path / "sft.json").write_text(json.dumps([row]))
    source = open_source(f"ssrl81k:{tmp_path / 'sft.json'}")
    items = item_dataset(source, range(1), weights(flip=1.0), processor, seed=0)
    learned = encode_responses([items[0], items[1]], processor, limit=64)
    assert [processor.decode(tokens) for tokens in learned] == [output, output]
    with pytest.raises(UserError, match=r"has \d+ tokens, above rollout.max_new_tokens=8"):
        encode_responses([items[0]], processor, limit=8)
    with pytest.raises(UserError, match="shuffle finds no record in ssrl81k"):
        item_dataset(source, range(1), weights(shuffle=1.0), processor, seed=0)


@pytest.mark.parametrize("task", ["depth", "position"])
def test_a_depth_task_without_depth_names_both(processor: Processor, task: str):
    source = Damaged(SCENES, bad=())
    with pytest.raises(UserError, match=f"{task} needs depth and folder:damaged has none") as error:
        item_dataset(source, range(4), weights(**{task: 1.0}), processor, seed=0)
    assert f"--config.tasks.{task}.weight=0" in str(error.value)
