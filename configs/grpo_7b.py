"""The paper's GRPO of Qwen2.5-VL-7B from its merged cold start, but for validation.

    python -m spatial_ssrl_jax.train --config=configs/grpo_7b.py \
        --config.data.source=folder:COCO+diode:DIODE+megadepth:MEGADEPTH

Starts from `runs/sft_7b/export`, which `configs/sft_7b.py` leaves. Published result: a mean of
56.58 over seven spatial benchmarks, from 52.69. It has not been run on the real weights.

Meant for a TPU v5e-32, weights over `fsdp=32`, sampling over 8 x 4 (one key/value head a chip); the
moments rest in host memory. Compiled for v5e:4x8, its tightest program takes 13.9 of 15.75 GiB a
chip. It fits as it stands on v6e:4x4 and v5p:2x2x4 too, and on two slices of v5e:4x4 with
`--config.mesh.data=2`; BUILD.md has the metrics.
"""

import dataclasses

from spatial_ssrl_jax import config as c


def get_config() -> c.Config:
    """360 steps of 256 prompts x 5 samples; what is not named here is the paper's by default."""
    base = c.Config(name="grpo_7b")
    return dataclasses.replace(
        base,
        model=c.ModelSettings(path="runs/sft_7b/export", attention_chunk=128),
        data=c.DataSettings(
            source="folder:data/coco+diode:data/diode+megadepth:data/megadepth",
            min_pixels=262_144,
            max_pixels=4_194_304,
            prompt_buckets=(544, 640, 1152, 1216, 1792, 1984, 2368, 4096),
            window_buckets=(32, 48, 72, 120, 136, 160, 256),
        ),
        grpo=c.GrpoSettings(
            micro_batch_prompts=32,  # one a chip
            response_buckets=(32, 64, 128, 192, 256, 320, 384, 512, 1024),
        ),
        rollout=c.RolloutSettings(batch_prompts=64, tensor=4),
        eval=c.EvalSettings(examples=64, every=5),
        optim=c.OptimSettings(offload=True),
    )
