"""A run that is over in seconds: a toy model with the shipped tokenizer, two stages, two tasks."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.qwen2_5_vl.config import config_to_dict
from spatial_ssrl_jax.run import models
from spatial_ssrl_jax.run.training import train
from tests.conftest import SMALL_TEXT, SMALL_VISION

# Two examples fit in a row. Each of two processes packs four.
ROWS = dict(prompts=8, row_tokens=320, row_windows=(2, 5), row_responses=64, micro_rows=4)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder with a smaller config."""
    folder = tmp_path_factory.mktemp("toy")
    tiny = models.open_model("tiny")
    models.copy_files(tiny, folder)
    config = dataclasses.replace(
        tiny.config,
        text=dataclasses.replace(tiny.config.text, **SMALL_TEXT),
        vision=dataclasses.replace(tiny.config.vision, **SMALL_VISION),
    )
    (folder / "config.json").write_text(json.dumps(config_to_dict(config, "float32")))
    return folder


def make_config(model: c.ModelSettings, **sections) -> c.Config:
    """A run of two stages over strips of built-in scenes; keywords replace whole sections."""
    base = c.Config(name="toy")
    tasks = {
        name: dataclasses.replace(settings, weight=float(name in ("shuffle", "flip")))
        for name, settings in base.tasks.items()
    }
    tasks["shuffle"] = dataclasses.replace(tasks["shuffle"], kinds={"3x1": 1.0})
    toy = dataclasses.replace(
        base,
        model=model,
        data=c.DataSettings(
            source="scenes:60",
            heldout_share=0.1,
            min_pixels=28 * 28,
            max_pixels=56 * 56,
            prompt_buckets=(192,),
            window_buckets=(5,),
            threads=1,
        ),
        tasks=tasks,
        sft=c.SftSettings(steps=2, learning_rate=1e-3, **ROWS),
        grpo=c.GrpoSettings(
            steps=3, prompts=16, updates=2, group=3, micro_prompts=8, learning_rate=1e-3
        ),
        rollout=c.RolloutSettings(limit=32, chunk=16, check_every=8, wave=8),
        # A large epsilon: else Adam makes whole steps of gradients that are nothing but rounding.
        optim=c.OptimSettings(eps=1e-2),
        checkpoint=c.CheckpointSettings(every=1, keep=2),
        log=c.LogSettings(rollouts_every=2, rollouts_count=2, report_every=2),
        eval=c.EvalSettings(examples=4, samples=2, every=2, prompts=8),
    )
    return dataclasses.replace(toy, **sections)


@pytest.fixture(scope="session")
def taught_config(toy_folder: Path) -> c.Config:
    """A cold start of the toy from scratch, long enough for some form."""
    return make_config(
        c.ModelSettings(str(toy_folder), True, "float32", "none"),
        sft=c.SftSettings(steps=110, learning_rate=1e-2, **ROWS),
        grpo=c.GrpoSettings(steps=0),
        optim=c.OptimSettings(),
        checkpoint=c.CheckpointSettings(every=1000),
        eval=c.EvalSettings(examples=8, samples=4, prompts=8),
    )


@pytest.fixture(scope="session")
def taught(taught_config: c.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that cold start."""
    workdir = tmp_path_factory.mktemp("taught") / "run"
    assert train(taught_config, workdir)
    return workdir


@pytest.fixture(scope="session")
def toy_config(taught: Path) -> Callable[..., c.Config]:
    """Makes a run's config that starts from the taught toy; keywords replace whole sections."""
    model = c.ModelSettings(str(taught / "export"), False, "float32", "none")
    return partial(make_config, model)


@pytest.fixture(scope="session")
def whole(toy_config: Callable[..., c.Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train(toy_config(), workdir)
    return workdir
