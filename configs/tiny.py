"""Built-in scenes, a 4.5-million-parameter Qwen2.5-VL from scratch: cold start, then GRPO.

python -m spatial_ssrl_jax.train --config=configs/tiny.py
"""

import dataclasses

from spatial_ssrl_jax import config as c


def get_config() -> c.Config:
    """The tiny run."""
    base = c.Config(name="tiny")
    weights = {"shuffle": 1.0, "flip": 1.0, "crop": 0.0, "depth": 0.0, "position": 0.0}
    tasks = {k: dataclasses.replace(s, weight=weights[k]) for k, s in base.tasks.items()}
    tasks["shuffle"] = dataclasses.replace(tasks["shuffle"], kinds={"2x2": 1.0})
    return dataclasses.replace(
        base,
        model=c.ModelSettings(path="tiny", from_scratch=True, dtype="float32", remat="none"),
        data=c.DataSettings(
            source="scenes",
            heldout_share=0.01,
            min_pixels=28 * 28,
            max_pixels=112 * 112,
            prompt_buckets=(168, 200),
            window_buckets=(1, 5),
            threads=2,
        ),
        tasks=tasks,
        sft=c.SftSettings(
            steps=300, prompts=32, micro_prompts=32, learning_rate=1e-3, weight_decay=0.01
        ),
        grpo=c.GrpoSettings(
            steps=100,
            prompts=16,
            updates=1,
            group=8,
            micro_prompts=16,
            learning_rate=2e-4,
            warmup=0.05,
            kl_coefficient=0.01,
        ),
        rollout=c.RolloutSettings(limit=32, chunk=32, check_every=4, wave=16),
        checkpoint=c.CheckpointSettings(every=50, keep=2),
        log=c.LogSettings(rollouts_every=10, rollouts_count=4, report_every=20),
        eval=c.EvalSettings(examples=64, samples=4, prompts=64),
    )
