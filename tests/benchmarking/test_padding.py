"""The fraction of padding under a config, computed by hand."""

from dataclasses import replace

import numpy as np
import pytest

from spatial_ssrl_jax.benchmarking.padding import measure_padding
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config, DataSettings, GrpoSettings, RolloutSettings
from spatial_ssrl_jax.data.lengths import Lengths, TaskLengths

CONFIG = replace(
    Config("x"),
    data=DataSettings(prompt_buckets=(64, 128), window_buckets=(4, 8)),
    grpo=GrpoSettings(
        prompts=8,
        minibatches_per_rollout=2,
        group_size=2,
        micro_batch_prompts=1,
        response_buckets=(16,),
    ),
    rollout=RolloutSettings(max_new_tokens=64, kv_block=32),
)


def one(tokens: int, words: int, response: int) -> TaskLengths:
    images = np.array([[tokens, tokens // 10]])
    return TaskLengths(1.0, np.ones(1), images, *np.array([[words], [response]]))


def test_a_mix_of_two_lengths():
    found = measure_padding(CONFIG, Lengths("x", (one(40, 8, 12), one(80, 16, 12))), 50, 20.0, 0.0)
    short = (found["prompt_tokens_mean"] - 96) / (48 - 96)  # fraction of short prompts drawn
    assert 0.4 < short < 0.6
    needed = found["prompt_tokens_mean"]
    computed = 128 - 64 * short
    synthetic, drawn = found["synthetic"], found["drawn"]
    assert synthetic["padding_share"] == pytest.approx(
        1 - (needed + 24) / (computed + 32), abs=1e-4
    )
    assert drawn["padding_share"] == pytest.approx(1 - (needed + 40) / (computed + 128), abs=1e-4)
    assert synthetic["min_share"] == drawn["min_share"] == 0
    assert synthetic["in_order_share"] > synthetic["padding_share"] + 0.1
    windows = 4 * short + 8 * (1 - short)
    assert synthetic["window_padding_share"] == pytest.approx(1 - windows / windows, abs=1e-4)
    assert synthetic["programs"] == drawn["programs"] == 2


def test_responses_spread_within_groups():
    found = measure_padding(CONFIG, Lengths("x", (one(40, 8, 12),)), 200, 20.0, 0.3)
    assert found["drawn"]["response_tokens_mean"] == pytest.approx(20, rel=0.03)
    assert 0 < found["drawn"]["min_share"] < found["drawn"]["padding_share"]
    assert found["synthetic"]["min_share"] == 0


@pytest.mark.parametrize("values", [(0, 20.0, 0.3), (1, 0.0, 0.3), (1, 20.0, -1.0)])
def test_numbers_out_of_range_are_refused(values: tuple[int, float, float]):
    with pytest.raises(UserError, match="--steps and --mean must be at least 1"):
        measure_padding(CONFIG, Lengths("x", (one(40, 8, 12),)), *values)
