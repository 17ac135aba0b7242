"""The shipped configs of the paper: sources, sizes and counts as it has them."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spatial_ssrl_jax.benchmarking.prompt_sharing import task_prompts
from spatial_ssrl_jax.config import Config, load_config
from spatial_ssrl_jax.config.validate import check_settings
from spatial_ssrl_jax.data.processor import ImageArea, Processor
from spatial_ssrl_jax.data.sources import OPENERS, open_source
from spatial_ssrl_jax.data.sources.mixture import split_spec
from spatial_ssrl_jax.data.stand_ins import stand_in
from spatial_ssrl_jax.data.task_sources import check_served, source_shares, task_sources, tasks_for
from spatial_ssrl_jax.qwen_vl.family import read_config
from spatial_ssrl_jax.tasks import TASKS_BY_NAME
from tests.conftest import ROOT
from tests.helpers.images import record as room_record

NAMES = ("sft_3b", "sft_7b", "grpo_3b", "grpo_7b", "grpo_3b_lora")


@pytest.fixture(params=NAMES)
def config(request: pytest.FixtureRequest) -> Config:
    return load_config(str(ROOT / "configs" / f"{request.param}.py"))


def test_tasks_draw_from_the_papers_sources(config: Config):
    parts = split_spec(config.data.source, list(OPENERS))
    plain, depth = ("shuffle", "flip", "crop"), ("depth", "position")
    assert [(part.spec.partition(":")[0], part.tasks, part.weight) for part in parts] == [
        ("folder", plain, 1), ("diode", depth, 1), ("megadepth", depth, 1),
    ]  # fmt: skip
    source = open_source(stand_in(config))
    check_served(source, tasks_for(source, config.task_settings))
    found = task_sources(source, range(len(source)), TASKS_BY_NAME["depth"], config.tasks["depth"])
    shares = source_shares(found)
    assert shares["scenes:9:1024x768"] == pytest.approx(0.5)
    assert shares["scenes:9:1600x1064"] == pytest.approx(3 / 8)


def test_prompts_fit_the_buckets_by_their_sources_sizes(config: Config, shared: Path):
    folder, limits = shared / "qwen2_5_vl", config.data
    area = ImageArea(limits.min_pixels, limits.max_pixels)
    processor = Processor(folder, read_config(folder / "3b"), area=area)
    prompts = task_prompts(config, processor)
    assert list(prompts) == list(TASKS_BY_NAME)
    largest = max(p.tokens for alike in prompts.values() for p in alike)
    bucket = min(b for b in limits.prompt_buckets if b >= largest)
    assert largest > 0.7 * bucket  # else a smaller bucket is missing


def test_released_pictures_cost_what_they_did(shared: Path):
    """A photo of 1600x1064 fills the boxes as 930x618 and 1155x768, and in full would be 2,166."""
    config = load_config(str(ROOT / "configs" / "grpo_3b.py"))
    tasks, size = config.tasks, (1064, 1600)
    assert TASKS_BY_NAME["depth"].sizes(size, tasks["depth"]) == [(618, 930)]
    assert TASKS_BY_NAME["position"].sizes(size, tasks["position"]) == [(768, 1155)]
    assert tasks["depth"].bands == tasks["position"].choice == "released"
    assert tasks["position"].headings == {"left": 30, "right": 30, "towards": 30, "away": 10}


def test_released_markers_are_as_wide_as_matplotlibs():
    """53 pixels of 15 pt and 41 of 12 pt, for a photo of 1024x768."""
    tasks, rec = load_config(str(ROOT / "configs" / "grpo_3b.py")).tasks, room_record(3, 768, 1024)
    for name, wide in (("depth", 53), ("position", 41)):
        example = TASKS_BY_NAME[name].make(rec, np.random.default_rng(0), tasks[name])
        (x, y), scale = example.truth["points"][0], example.images[0].shape[0] / 768
        x, y = int((x + 0.5) * scale), int((y + 0.5) * scale)
        row = (example.images[0][y - 8] == 255).all(axis=1)[x - 40 : x + 41]
        chord = np.flatnonzero(row)
        radius = np.hypot((chord[-1] - chord[0]) / 2, 8)
        assert abs(2 * radius + 1 - wide) < 8  # without the black edge


def test_areas_are_the_papers():
    limits = {n: load_config(str(ROOT / "configs" / f"{n}.py")).data for n in NAMES}
    found = {n: (data.min_pixels, data.max_pixels) for n, data in limits.items()}
    grpo, cold_start = (262_144, 4_194_304), (1, 262_144)
    assert found == {
        "sft_3b": cold_start, "sft_7b": cold_start, "grpo_3b": grpo, "grpo_7b": grpo,
        "grpo_3b_lora": cold_start,
    }  # fmt: skip


def test_the_cold_start_is_3600_examples_five_times():
    sft = load_config(str(ROOT / "configs" / "sft_3b.py")).sft
    assert (sft.examples, sft.prompts, sft.examples % sft.prompts) == (3600, 256, 16)
    assert sft.steps == 5 * math.ceil(sft.examples / sft.prompts) == 75


def test_one_gpu_gets_a_cold_start_in_the_same_run():
    config = load_config(str(ROOT / "configs" / "grpo_3b_lora.py"))
    assert config.sft.steps == 75 and config.sft.lora.rank and config.grpo.lora.rank
    assert (config.sft.examples, config.sft.prompts) == (3600, 256)
    check_settings(config)


@pytest.mark.parametrize("name", NAMES)
def test_tasks_beyond_the_papers_are_off(name: str):
    config = load_config(str(ROOT / "configs" / f"{name}.py"))
    assert config.tasks["shuffle"].kinds["3x3"] == 0 and not config.reward.partial_credit
    assert {k for k, w in config.tasks["depth"].kinds.items() if w} == {"3_points"}


def test_eight_gpus_train_the_same():
    """Only where arrays are and what computes them differs; all sizes divide."""
    paper, gpus = (load_config(str(ROOT / "configs" / f"grpo_3b{x}.py")) for x in ("", "_8gpu"))
    check_settings(gpus)
    assert (gpus.model.attention, gpus.rollout.attention) == ("cudnn", "triton")
    for count in (gpus.grpo.micro_batch_rows, gpus.rollout.prefill_prompts):
        assert count % gpus.mesh.fsdp == 0
    names = ("name", "mesh", "model", "rollout")
    same = replace(gpus, **{name: getattr(paper, name) for name in names})
    grpo = replace(gpus.grpo, micro_batch_rows=paper.grpo.micro_batch_rows)
    assert replace(same, grpo=grpo) == paper
    assert gpus.model.path == paper.model.path
    assert gpus.rollout.max_new_tokens == paper.rollout.max_new_tokens


def test_the_config_beyond_the_paper_changes_nothing_else():
    paper, plus = (load_config(str(ROOT / "configs" / f"grpo_7b{x}.py")) for x in ("", "_plus"))
    kinds = plus.tasks["shuffle"].kinds
    assert kinds["3x3"] == sum(kinds.values()) / 2 and plus.reward.partial_credit
    assert {k for k, w in plus.tasks["depth"].kinds.items() if w} == {"3_points", "6_points"}
    tasks = {
        name: replace(plus.tasks[name], kinds=paper.tasks[name].kinds)
        for name in paper.tasks
        if hasattr(paper.tasks[name], "kinds")
    }
    same = replace(plus, name=paper.name, reward=paper.reward, tasks=plus.tasks | tasks)
    assert same == paper
