"""The paper's cold start of Qwen2.5-VL-3B: LoRA 128/256 on the language model, merged at the end.

    SOURCE=shuffle,flip,crop@folder:COCO
    SOURCE+=+depth,position@diode:DIODE+depth,position@megadepth:MEGADEPTH
    python -m spatial_ssrl_jax.train --config=configs/sft_3b.py \
        --config.data.source=$SOURCE

3,600 examples are learned five times: 15 steps each time, of which the last has 16 examples.
Responses are made from the tasks themselves unless `--config.sft.responses=FILE` names the released
cold-start JSON, all of whose questions are then learned. Meant for a TPU v5e-16 (compiled: 5.1 of
15.75 GiB a chip), or one 80 GB GPU with `--config.sft.micro_batch_rows=1
--config.rollout.tensor=1` (compiled for `a100-80gb`: 12.6 GiB). It has not been run on the real
weights.
"""

from spatial_ssrl_jax import config as c


def get_config() -> c.Config:
    """75 steps of 256 samples, at most 2,048 + 1,024 tokens, images of 262,144 pixels.

    With the usual sizes of COCO, DIODE and MegaDepth and synthetic responses, prompts have 550
    tokens on average and 256 samples take up to 48 rows, three micro-batches: 12 % of the tokens
    and 18 % of the patches are padding.
    """
    return c.Config(
        name="sft_3b",
        model=c.ModelSettings(path="Qwen/Qwen2.5-VL-3B-Instruct", attention_chunk=256),
        data=c.DataSettings(
            source="shuffle,flip,crop@folder:data/coco"
            "+depth,position@diode:data/diode+depth,position@megadepth:data/megadepth",
            transparency="drop",
            min_pixels=1,
            max_pixels=262_144,
            prompt_buckets=(1024, 2048),
        ),
        tasks=c.released_tasks(),
        sft=c.SftSettings(
            steps=75,
            prompts=256,
            row_tokens=(3456,),
            row_patches=(10_496,),
            row_responses=(1024,),
            micro_batch_rows=16,
            lora=c.LoraSettings(rank=128, alpha=256.0),
        ),
        grpo=c.GrpoSettings(steps=0),
        rollout=c.RolloutSettings(max_new_tokens=1024),
        checkpoint=c.CheckpointSettings(every=25),
    )
