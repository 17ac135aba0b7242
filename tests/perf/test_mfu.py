"""FLOPs that a step needs and MFU, against sums computed by hand."""

import jax
import numpy as np
import pytest

from spatial_ssrl_jax.config.schema import GrpoSettings, SftSettings, StageSettings
from spatial_ssrl_jax.perf import mfu as module
from spatial_ssrl_jax.perf.device_specs import DeviceSpec
from spatial_ssrl_jax.perf.flops import GroupShape, group_flops, vision_flops
from spatial_ssrl_jax.perf.mfu import mfu_metrics, update_passes, useful_flops
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings

GRIDS = ((1, 4, 6), (1, 8, 12))  # neither fills whole windows


@pytest.fixture
def prompts(toy):
    """Prompts of different lengths."""
    made = [toy.prompt(0, 9, GRIDS[:1]), toy.prompt(1, 14, GRIDS)]
    return made, [len(p.ids) for p in made]


def test_padding_does_not_count(toy, prompts):
    batch, lengths = prompts
    stage = GrpoSettings(
        minibatches_per_rollout=1, kl_coef=0.0
    )  # sampling, and an update: 4 passes
    found = useful_flops(toy.config, stage, batch, np.full((2, 3), 7))
    wanted = sum(
        group_flops(toy.config, GroupShape(length, grids, 3, 7))
        for length, grids in zip(lengths, (GRIDS[:1], GRIDS), strict=True)
    )
    assert found == pytest.approx(4 * wanted)
    updated = np.array([True, False])  # the other group counts as sampled alone
    found = useful_flops(toy.config, stage, batch, np.full((2, 3), 7), updated)
    first = group_flops(toy.config, GroupShape(lengths[0], GRIDS[:1], 3, 7))
    assert found == pytest.approx(wanted + 3 * first)


def test_every_response_counts_at_its_own_length(toy, prompts):
    batch, lengths = prompts
    stage = SftSettings(freeze=("vision",))
    found = useful_flops(toy.config, stage, batch, np.array([[2], [5]]))
    wanted = 0.0
    for length, grids, response in zip(lengths, (GRIDS[:1], GRIDS), (2, 5), strict=True):
        vision = vision_flops(toy.config, grids)
        whole = group_flops(toy.config, GroupShape(length, grids, 1, response))
        wanted += vision + 3 * (whole - vision)
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        (SftSettings(), (3, 3)),
        (SftSettings(freeze=("language",)), (3, 2)),
        (SftSettings(lora=LoraSettings(4)), (1, 2)),
        (SftSettings(lora=LoraSettings(4, targets=("language", "vision.qkv"))), (2, 2)),
        (GrpoSettings(), (4.5, 4.5)),  # old log-probabilities of the second half alone
        (GrpoSettings(minibatches_per_rollout=4), (4.75, 4.75)),
        (GrpoSettings(minibatches_per_rollout=1), (4, 4)),
        (GrpoSettings(old_logprobs="sampler", kl_coef=0.0), (3, 3)),
        (GrpoSettings(freeze=("vision", "merger")), (1, 4.5)),
        (GrpoSettings(lora=LoraSettings(4)), (1, 3.5)),
        (GrpoSettings(lora=LoraSettings(4, targets=("language", "vision"))), (3.5, 3.5)),
    ],
)
def test_passes_are_those_of_the_stage(stage: StageSettings, wanted: tuple[float, float]):
    assert update_passes(stage) == wanted


def test_mfu_is_given_only_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch):
    assert mfu_metrics(6e12, 2.0) == {"perf/flops_per_second": 3e12}
    monkeypatch.setattr(module, "device_spec", lambda: DeviceSpec(6e12, 1.0))
    found = mfu_metrics(6e12, 2.0)
    assert found["perf/mfu"] == pytest.approx(0.5 / jax.device_count())
