"""How many prompts are sampled and prefilled at a time."""

from dataclasses import replace

import jax
import pytest

from spatial_ssrl_jax.config.schema import Config, DataSettings, GrpoSettings, RolloutSettings
from spatial_ssrl_jax.parallel.mesh import make_mesh
from spatial_ssrl_jax.parallel.sharding import Layout
from spatial_ssrl_jax.rl import placement
from spatial_ssrl_jax.rl.placement import cache_bytes, prefill_prompts, rollout_prompts

CONFIG = Config(
    "x",
    data=DataSettings(prompt_buckets=(50, 100)),
    grpo=GrpoSettings(prompts=12, group_size=5, micro_batch_rows=6),
    rollout=RolloutSettings(max_new_tokens=80),
)


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout(make_mesh(CONFIG.mesh, jax.devices("cpu")[:1]))


@pytest.mark.parametrize(("fitting", "expected"), [(11.5, 6), (12, 12), (4, 4), (0.5, 1)])
def test_as_many_prompts_as_memory_holds(toy, layout: Layout, fitting: float, expected: int):
    """Beside weights, moments and reference, at the largest bucket and the longest responses."""
    rollout = layout.rollout(1)
    held = placement._held_while_sampling(CONFIG, toy.config, layout, rollout)
    one = cache_bytes(CONFIG, toy.config, rollout, 100 + 5 * 80)
    memory = int((held + fitting * one) / placement._FILLED) + 1
    assert rollout_prompts(CONFIG, toy.config, layout, rollout, memory) == expected


def test_what_training_keeps_takes_memory(toy, layout: Layout):
    rollout = layout.rollout(1)

    def held(config: Config) -> int:
        return placement._held_while_sampling(config, toy.config, layout, rollout)

    whole = held(CONFIG)
    assert held(replace(CONFIG, optim=replace(CONFIG.optim, offload=True))) < whole / 2
    assert held(replace(CONFIG, grpo=replace(CONFIG.grpo, kl_coef=0.0))) < whole


def test_the_setting_comes_first_and_all_prompts_where_memory_is_not_known(toy, layout: Layout):
    rollout = layout.rollout(1)
    given = replace(CONFIG, rollout=replace(CONFIG.rollout, batch_prompts=3))
    assert rollout_prompts(given, toy.config, layout, rollout, 1) == 3
    assert rollout_prompts(CONFIG, toy.config, layout, rollout, None) == 12


@pytest.mark.parametrize(
    ("batch", "limit", "shards", "expected"),
    [(256, 64, 8, 64), (256, 100, 8, 64), (12, 64, 1, 12), (12, 5, 2, 4), (6, 1, 2, 2)],
)
def test_prefilled_prompts_divide_the_batch(batch: int, limit: int, shards: int, expected: int):
    assert prefill_prompts(batch, limit, shards) == expected
