"""The paper's GRPO of Qwen2.5-VL-7B from its merged cold start, but for validation.

    SOURCE=shuffle,flip,crop@folder:COCO
    SOURCE+=+depth,position@diode:DIODE+depth,position@megadepth:MEGADEPTH
    python -m spatial_ssrl_jax.train --config=configs/grpo_7b.py \
        --config.data.source=$SOURCE

Starts from `runs/sft_7b/export`, which `configs/sft_7b.py` leaves. Published result: a mean of
56.58 over seven spatial benchmarks, from 52.69. It has not been run on the real weights.

Meant for a TPU v5e-32, weights over `fsdp=32`, sampling over 8 x 4 (one key/value head a chip);
AdamW's moments are in host memory between updates. Compiled for v5e:4x8, its tightest program takes
13.6 of 15.75 GiB a chip. The same config fits on v6e:4x4 and v5p:2x2x4, and on two slices of
v5e:4x4 with `--config.mesh.data=2`; BUILD.md has the measurements.
"""

from dataclasses import replace
from pathlib import Path

from spatial_ssrl_jax import config as c


def get_config() -> c.Config:
    """`grpo_3b.py` with the 7B, sharded over more chips."""
    base = c.load_config(str(Path(__file__).with_name("grpo_3b.py")))
    return replace(
        base,
        name="grpo_7b",
        model=replace(base.model, path="runs/sft_7b/export", attention_chunk=128),
        grpo=replace(
            base.grpo,
            row_tokens=(9280, 11_584, 14_464),
            row_patches=(16_000, 20_000, 16_384),  # the longest with little room beside its tokens
            row_responses=(6080, 7552, 10_240),
            micro_batch_rows=32,  # one a chip
        ),
        rollout=replace(base.rollout, tensor=4),
        optim=c.OptimSettings(offload=True),
    )
