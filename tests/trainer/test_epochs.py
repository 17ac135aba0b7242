"""A cold start's examples: how many, how often, and how a file's tasks are shared out."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.pipeline import Batch
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.rl.stages import stages
from spatial_ssrl_jax.tasks import flip
from spatial_ssrl_jax.trainer.context import open_components, pipeline
from tests.data.test_ssrl81k import SHUFFLE


def first_batches(config: c.Config, count: int) -> list[Batch]:
    """The first batches of a cold start from built-in scenes."""
    tiny = open_model("tiny")
    source = open_source("scenes:40")
    components = SimpleNamespace(
        config=config,
        source=source,
        split=SimpleNamespace(train=range(len(source))),
        processor=Processor(tiny.files, tiny.config),
    )
    stream = pipeline(components, stages(config)[0], start=0)
    found = [next(stream) for _ in range(count)]
    stream.close()
    return found


def cold_start(**settings) -> c.Config:
    sft = c.SftSettings(steps=9, prompts=4, **settings)
    data = c.DataSettings(min_pixels=784, max_pixels=112 * 112, threads=1)
    return c.Config("x", model=c.ModelSettings("tiny", from_scratch=True), sft=sft, data=data)


def words(batches: list[Batch]) -> list[tuple[str, str]]:
    items = [item for batch in batches for item in batch.items]
    return [(item.example.source["record"], item.example.question) for item in items]


@pytest.mark.parametrize(("examples", "sizes"), [(6, [4, 2, 4, 2]), (0, [4, 4, 4, 4])])
def test_examples_are_repeated_or_new(examples: int, sizes: list[int]):
    batches = first_batches(cold_start(examples=examples), 4)
    assert [len(batch.items) for batch in batches] == sizes
    first, second = words(batches[:2]), words(batches[2:])
    assert (sorted(first) == sorted(second)) == bool(examples)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Four questions: three of flip, which is the rarest task by weight, and one of shuffle."""
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    rows = [
        {
            "instruction": f"<image>{text}",
            "input": "",
            "output": f"<think>x</think> \\boxed{{{number}-0}}",
            "images": ["a.png"],
        }
        for number, text in enumerate([flip.QUESTION] * 3 + [SHUFFLE["1x3"]])
    ]
    (tmp_path / "sft.json").write_text(json.dumps(rows))
    return tmp_path / "sft.json"


def test_a_file_keeps_its_own_shares_unless_told_otherwise(file: Path):
    def answers(count: int, **settings) -> Counter[tuple[str, str]]:
        config = cold_start(responses=str(file), **settings)
        tasks = {
            name: replace(task, weight=float(name in ("flip", "shuffle")))
            for name, task in config.tasks.items()
        }
        batches = first_batches(replace(config, tasks=tasks), count)
        items = [item for batch in batches for item in batch.items]
        return Counter((item.example.task, item.example.answer) for item in items)

    whole = [("flip", "0-0"), ("flip", "1-0"), ("flip", "2-0"), ("shuffle", "3-0")]
    assert answers(1) == dict.fromkeys(whole, 1)
    assert answers(3) == dict.fromkeys(whole, 3)
    assert sum(answers(1, examples=2).values()) == 2
    by_weight = answers(1, task_shares="tasks")
    assert by_weight["shuffle", "3-0"] > 1


def test_a_response_that_is_too_long_is_named_before_the_run(file: Path):
    rows = json.loads(file.read_text())
    rows[2]["output"] = "<think>" + "far " * 3000 + "</think> \\boxed{2-0}"
    file.write_text(json.dumps(rows))
    config = cold_start(responses=str(file))
    data = replace(config.data, source="scenes:40", heldout_fraction=0.0)
    with pytest.raises(UserError, match=r"the response of sft\.json#2 has \d+ tokens, above roll"):
        open_components(replace(config, data=data))


def test_the_tasks_weights_do_not_leave_out_a_files_questions(file: Path):
    config = cold_start(responses=str(file))
    tasks = config.tasks | {"flip": replace(config.tasks["flip"], weight=0.0)}
    (batch,) = first_batches(replace(config, tasks=tasks), 1)
    assert Counter(item.example.task for item in batch.items) == {"flip": 3, "shuffle": 1}
