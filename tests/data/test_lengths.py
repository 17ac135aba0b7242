"""Lengths found from sizes are those of the prompts that a run makes."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.items import item_dataset
from spatial_ssrl_jax.data.lengths import Lengths
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.task_sources import tasks_for

SOURCE = "scenes:6:112x84+scenes:6:140x140"


@pytest.fixture(scope="module")
def config() -> Config:
    base = Config("x")
    tasks = {n: replace(s, weight=float(n in ("flip", "crop"))) for n, s in base.tasks.items()}
    return replace(base, tasks=tasks)


@pytest.fixture(scope="module")
def processor() -> Processor:
    folder = open_model("tiny")
    return Processor(folder.files, folder.config, 56 * 56, 112 * 112)


def test_prompts_are_as_long_as_measured(config, processor):
    lengths = Lengths.open(config, processor, SOURCE)
    sizes, responses = lengths.draw(np.random.default_rng(0), 400)
    drawn = set(map(tuple, sizes.tolist()))
    source = open_source(SOURCE)
    items = item_dataset(
        source, range(len(source)), tasks_for(source, config.task_settings), processor, seed=0
    )
    prompts = [items[i].prompt for i in range(24)]
    found = {(len(p.ids), len(p.frame)) for p in prompts}
    assert found == drawn and len(drawn) == 4
    assert 5 < responses.min() <= responses.max() < 60


def test_a_source_without_images_for_a_task_is_named(config, processor, tmp_path):
    Image.new("RGB", (112, 84)).save(tmp_path / "x.png")
    tasks = {n: replace(s, weight=float(n == "depth")) for n, s in config.tasks.items()}
    with pytest.raises(UserError, match="no images for depth"):
        Lengths.open(replace(config, tasks=tasks), processor, f"folder:{tmp_path}")
