"""GRPO of Qwen2.5-VL-3B with LoRA, for one GPU of 24 to 48 GB.

    python -m spatial_ssrl_jax.train --config=configs/grpo_3b_lora.py \
        --config.data.source=folder:COCO+diode:DIODE

Not the paper's setting: adapters of rank 64, fewer prompts a step, smaller images and shorter
responses. The base in bfloat16 is the KL's reference. Compiled for `rtx4090` (24 GB), prefill takes
most, 21.1 of 22.3 GiB. It has not been run on the real weights.
"""

from spatial_ssrl_jax import config as c


def get_config() -> c.Config:
    """64 prompts x 5 samples a step, one update."""
    return c.Config(
        name="grpo_3b_lora",
        model=c.ModelSettings(path="Qwen/Qwen2.5-VL-3B-Instruct", attention_chunk=256),
        data=c.DataSettings(
            source="folder:data/coco+diode:data/diode+megadepth:data/megadepth",
            min_pixels=56 * 56,
            max_pixels=262_144,
            prompt_buckets=(464, 512, 640, 768, 800, 1024, 2048),
            window_buckets=(24, 32, 60, 72, 128),
        ),
        grpo=c.GrpoSettings(
            prompts=64,
            minibatches_per_rollout=1,
            micro_batch_prompts=1,
            response_buckets=(32, 64, 128, 192, 256, 320, 384),
            learning_rate=1e-5,
            lora=c.LoraSettings(rank=64, alpha=128.0),
        ),
        rollout=c.RolloutSettings(max_new_tokens=512, kv_block=128, batch_prompts=16),
        eval=c.EvalSettings(examples=32, batch_prompts=16, every=10),
    )
