"""Cold start and GRPO of Qwen2.5-VL-3B with LoRA, for one GPU of 24 to 48 GB.

    SOURCE=shuffle,flip,crop@folder:COCO
    SOURCE+=+depth,position@diode:DIODE+depth,position@megadepth:MEGADEPTH
    python -m spatial_ssrl_jax.train --config=configs/grpo_3b_lora.py \
        --config.data.source=$SOURCE

The cold start is that of `sft_3b.py`, without which the paper reports that the reward collapses;
its adapters are merged before GRPO begins. GRPO is not the paper's: adapters of rank 64, fewer
prompts a step, smaller images and shorter responses, of at most 512 tokens. The merged base in
bfloat16 is the KL's reference. Compiled for `rtx4090` (24 GB), prefill takes most, 19.6 of 22.3
GiB, and a row of the cold start 12.6; its 75 steps of up to 48 rows take 0.7 hours there at least,
and a step of GRPO at the longest prompts and responses two minutes. It has not been run on the real
weights.
"""

from dataclasses import replace
from pathlib import Path

from spatial_ssrl_jax import config as c


def get_config() -> c.Config:
    """75 steps of 256 samples, then 64 prompts x 5 samples a step, one update."""
    cold_start = c.load_config(str(Path(__file__).with_name("sft_3b.py")))
    return c.Config(
        name="grpo_3b_lora",
        model=c.ModelSettings(path="Qwen/Qwen2.5-VL-3B-Instruct", attention_chunk=256),
        data=replace(
            cold_start.data,
            prompt_buckets=(528, 800, 2048),
        ),
        tasks=cold_start.tasks,
        sft=replace(cold_start.sft, micro_batch_rows=1),
        grpo=c.GrpoSettings(
            prompts=64,
            minibatches_per_rollout=1,
            micro_batch_rows=1,
            learning_rate=1e-5,
            lora=c.LoraSettings(rank=64, alpha=128.0),
        ),
        rollout=c.RolloutSettings(max_new_tokens=512, kv_block=128, batch_prompts=16),
        eval=c.EvalSettings(examples=32, batch_prompts=16, every=10),
    )
