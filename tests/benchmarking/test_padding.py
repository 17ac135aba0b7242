"""What an update computes for padding under a config, worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from spatial_ssrl_jax.benchmarking.padding import measure_padding
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config, DataSettings, GrpoSettings, RolloutSettings
from spatial_ssrl_jax.data.lengths import Lengths, TaskLengths
from spatial_ssrl_jax.perf.response_lengths import LogNormalLengths
from tests.rl.conftest import CONFIG as MODEL

CONFIG = replace(
    Config("x"),
    data=DataSettings(prompt_buckets=(64, 128), patch_buckets=(160, 320)),
    grpo=GrpoSettings(
        prompts=8,
        minibatches_per_rollout=2,
        group_size=2,
        row_tokens=(256, 256),
        row_patches=(360, 400),
        row_responses=(64, 128),
        micro_batch_rows=1,
    ),
    rollout=RolloutSettings(max_new_tokens=64, kv_block=32),
)
TWENTY = LogNormalLengths(20.0, 0.0, 64, 0.4)


def one(tokens: int, words: int, response: int, patches: int = 160) -> TaskLengths:
    """A task with images of so many tokens."""
    images = np.array([[tokens, patches]])
    return TaskLengths(1.0, np.ones(1), images, *np.array([[words], [response]]))


def measure(*tasks: TaskLengths, config: Config = CONFIG, **changes) -> dict:
    drawn = {"steps": 5, "responses": TWENTY} | changes
    return measure_padding(config, MODEL, Lengths("x", tasks), **drawn)


def test_prompts_of_one_length():
    """Groups of 40 + 8 + 2 x 12 = 72 and 48 + 2 x 20 = 88 tokens: two in each row, with
    160 patches each; rows of 64 response tokens hold two of 24, and one of 40, those of 128 two.
    """
    found = measure(one(40, 8, 12))
    assert found["config"] == "x" and found["source"] == "x" and found["steps"] == 5
    assert found["prompt_tokens_mean"] == 48
    assert found["prompt_tokens"] == {"10%": 48, "50%": 48, "90%": 48, "100%": 48}
    assert set(found["prompt_patches"].values()) == {160}
    synthetic, drawn = found["synthetic"], found["drawn"]
    assert (synthetic["response_tokens_mean"], drawn["response_tokens_mean"]) == (12, 20)
    assert synthetic["token_padding_share"] == pytest.approx(1 - 144 / 256, abs=1e-4)
    assert synthetic["response_padding_share"] == pytest.approx(1 - 48 / 64, abs=1e-4)
    assert drawn["token_padding_share"] == pytest.approx(1 - 176 / 256, abs=1e-4)
    assert drawn["response_padding_share"] == pytest.approx(1 - 80 / 128, abs=1e-4)
    assert synthetic["patch_padding_share"] == pytest.approx(1 - 320 / 360, abs=1e-4)
    assert drawn["patch_padding_share"] == pytest.approx(1 - 320 / 400, abs=1e-4)
    assert synthetic["programs"] == drawn["programs"] == 1


def test_flops_are_those_of_matmuls():
    """Of two layers of width 32 each, and of the head; the sizes are those above."""
    found = measure(one(40, 8, 12))
    text, vision = (2 * (32 * n + 3 * 32 * 48) for n in (96, 128))
    head = 32 * MODEL.text.vocab_size
    needed = 144 * text + 320 * vision + 48 * head
    computed = 256 * text + 360 * vision + 64 * head
    assert found["synthetic"]["flops_ratio"] == pytest.approx(computed / needed, abs=1e-4)
    needed = 176 * text + 320 * vision + 80 * head
    computed = 256 * text + 400 * vision + 128 * head
    assert found["drawn"]["flops_ratio"] == pytest.approx(computed / needed, abs=1e-4)


def test_a_mix_of_two_lengths():
    """Groups of 88 and 216 tokens, of which two short ones share a row."""
    one_size = {"row_tokens": (256,), "row_patches": (320,), "row_responses": (128,)}
    config = replace(CONFIG, grpo=replace(CONFIG.grpo, **one_size))
    found = measure(one(40, 8, 12), one(80, 16, 12, patches=320), config=config, steps=50)
    short = (found["prompt_tokens_mean"] - 96) / (48 - 96)  # fraction of short prompts drawn
    assert 0.4 < short < 0.6
    assert [found["prompt_tokens"][share] for share in ("10%", "90%")] == [48, 96]
    drawn = found["drawn"]
    rows = (400 * (found["prompt_tokens_mean"] + 40)) / (1 - drawn["token_padding_share"]) / 256
    # In an update of four, two short prompts share a row, so that one is left where their number
    # is odd, which is so in half of them.
    assert rows == pytest.approx(400 * (1 - short / 2) + 100 / 4, rel=0.02)
    assert drawn["programs"] == found["synthetic"]["programs"] == 1


def test_rows_of_a_micro_batch_that_lack_groups_are_padding():
    """Four groups of an update have two rows of eight."""
    config = replace(CONFIG, grpo=replace(CONFIG.grpo, micro_batch_rows=8))
    found = measure(one(40, 8, 12), config=config)
    padding = found["synthetic"]["token_padding_share"]
    assert padding == pytest.approx(1 - 2 * 144 / (8 * 256), abs=1e-4)


def test_what_is_too_large_for_short_rows_goes_into_longer_ones():
    """Rows of 100 tokens hold groups of 72 or 88, and none of 144 and 160, of 320 patches."""
    sizes = {"row_tokens": (100, 256), "row_patches": (160, 320), "row_responses": (40, 128)}
    config = replace(CONFIG, grpo=replace(CONFIG.grpo, **sizes))
    tasks = one(40, 8, 12), one(112, 8, 12, patches=320)
    found = measure(*tasks, config=config, steps=50)
    short = (found["prompt_tokens_mean"] - 120) / (48 - 120)  # fraction of short prompts drawn
    needed = found["prompt_tokens_mean"] + 24
    share = 1 - needed / (100 * short + 256 * (1 - short))
    assert found["synthetic"]["token_padding_share"] == pytest.approx(share, abs=1e-4)
    assert found["synthetic"]["programs"] == 2


def test_responses_are_drawn_as_asked():
    """No longer than the config allows."""
    spread = LogNormalLengths(20.0, 0.3, 64, 0.4)
    found = measure(one(40, 8, 12), steps=200, responses=spread)["drawn"]
    assert found["response_tokens_mean"] == pytest.approx(20, rel=0.03)
    assert found["token_padding_share"] == pytest.approx(1 - 176 / 256, abs=0.02)
    longer = LogNormalLengths(2000.0, 0.0, 4000, 0.4)
    assert measure(one(40, 8, 12), responses=longer)["drawn"]["response_tokens_mean"] == 64


@pytest.mark.parametrize(
    ("steps", "responses"),
    [
        (0, TWENTY),
        (1, LogNormalLengths(0.0, 0.3)),
        (1, LogNormalLengths(20.0, -1.0)),
        (1, LogNormalLengths(20.0, 0.3, correlation=-0.1)),
        (1, LogNormalLengths(20.0, 0.3, correlation=1.1)),
    ],
)
def test_numbers_out_of_range_are_refused(steps: int, responses: LogNormalLengths):
    said = "--steps and --mean must be at least 1, --spread at least 0, and --correlation between 0"
    with pytest.raises(UserError, match=said):
        measure(one(40, 8, 12), steps=steps, responses=responses)
