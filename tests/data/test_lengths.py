"""Lengths found from sizes are those of the prompts that a run makes."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config, DataSettings, ModelSettings
from spatial_ssrl_jax.data.items import item_dataset
from spatial_ssrl_jax.data.lengths import Lengths
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources import open_source

SOURCE = "scenes:6:112x84+scenes:6:140x140"


@pytest.fixture(scope="module")
def config() -> Config:
    base = Config("x")
    tasks = {n: replace(s, weight=float(n in ("flip", "crop"))) for n, s in base.tasks.items()}
    data = DataSettings(min_pixels=56 * 56, max_pixels=112 * 112)
    return replace(base, tasks=tasks, data=data, model=ModelSettings(path="tiny"))


def test_prompts_are_as_long_as_measured(config):
    lengths = Lengths.open(config, spec=SOURCE)
    extents, responses = lengths.draw(np.random.default_rng(0), 400)
    drawn = set(map(tuple, extents.tolist()))
    folder = open_model("tiny")
    processor = Processor(folder.files, folder.config, 56 * 56, 112 * 112)
    source = open_source(SOURCE)
    made = item_dataset(source, range(len(source)), config.tasks, processor, seed=0)
    prompts = [made[i].prompt for i in range(24)]
    assert {(len(p.ids), len(p.frame)) for p in prompts} == drawn and len(drawn) == 4
    assert 5 < responses.min() <= responses.max() < 60


def test_a_source_without_pictures_for_a_task_is_named(config, tmp_path):
    Image.new("RGB", (112, 84)).save(tmp_path / "x.png")
    tasks = {n: replace(s, weight=float(n == "depth")) for n, s in config.tasks.items()}
    with pytest.raises(UserError, match="no images for depth"):
        Lengths.open(replace(config, tasks=tasks), spec=f"folder:{tmp_path}")
