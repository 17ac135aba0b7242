"""GRPO of Qwen2.5-VL-7B on the paper's tasks and two harder ones, with partial credit.

    python -m spatial_ssrl_jax.train --config=configs/grpo_7b_plus.py --config.data.source=$SOURCE

`grpo_7b.py` with what is not the paper's: `shuffle` has 3x3 patches beside the paper's grids, as
often as all of them; `depth` has six regions as often as three; and a wrong order of the right
labels earns 0.2 times the fraction of its places that are right. Both tasks and the credit are
those of Visual Jigsaw (arXiv 2509.25190), which trains one at a time on the same base and reports,
for six depths, SAT-Real +15.3, DA-2K +17.1 and VSI-Bench +2.9, and for 3x3 patches MMVP +6.0 and
DA-2K +5.9. What they give together with the paper's tasks is not known: it has not been run.
"""

from dataclasses import replace
from pathlib import Path

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.tasks.depth import DepthSettings
from spatial_ssrl_jax.tasks.shuffle import ShuffleSettings


def get_config() -> c.Config:
    """`grpo_7b.py` with 3x3 patches, six regions and partial credit."""
    base = c.load_config(str(Path(__file__).with_name("grpo_7b.py")))
    shuffle, depth = base.tasks["shuffle"], base.tasks["depth"]
    assert isinstance(shuffle, ShuffleSettings) and isinstance(depth, DepthSettings)
    kinds = {**shuffle.kinds, "3x3": sum(shuffle.kinds.values())}
    return replace(
        base,
        name="grpo_7b_plus",
        tasks=base.tasks
        | {
            "shuffle": replace(shuffle, kinds=kinds),
            "depth": replace(depth, kinds={"3_points": 1.0, "6_points": 1.0}),
        },
        reward=replace(base.reward, partial_credit=True),
    )
