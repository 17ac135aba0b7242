"""The paper's GRPO of Qwen2.5-VL-3B from its merged cold start, but for validation.

    SOURCE=shuffle,flip,crop@folder:COCO
    SOURCE+=+depth,position@diode:DIODE+depth,position@megadepth:MEGADEPTH
    python -m spatial_ssrl_jax.train --config=configs/grpo_3b.py \
        --config.data.source=$SOURCE

Without the override it reads `data/coco`, `data/diode` and `data/megadepth`. Questions and pictures
are those of the released data, `c.released_tasks()`; `tasks=…` left out gives the paper's text.
A step is one rollout of 256 prompts with its two optimizer steps, so that 360 steps are 92,160
prompts, 1.14 times as many as the released set has; "360 steps" in the paper may also mean
optimizer steps, which are 180 here. With the usual sizes of the three sets a prompt has 1,120
tokens on average, 955 in the median and 1,819 at most.

Starts from `runs/sft_3b/export`, which `configs/sft_3b.py` leaves. Published result: a mean of
50.54 over seven spatial benchmarks, from 45.91. It has not been run on the real weights.

Meant for a TPU v5e-16, weights over `fsdp=16`, sampling over 8 x 2. Compiled for v5e:4x4, decoding
256 prompts of 4,096 tokens with the widest caches takes 14.9 of 15.75 GiB a chip, and the gradients
of a micro-batch 12.6; BUILD.md has the others. Gradients, log-probabilities
and prefill are bound by compute, decoding by the memory bandwidth of weights and caches, the copy
of the weights by the network. One GPU of 80 GB holds it with

    --config.rollout.tensor=1 --config.rollout.batch_prompts=16 --config.grpo.micro_batch_rows=1
    --config.eval.batch_prompts=16 --config.optim.offload=True

Compiled for `h100`, the optimizer's step takes most, 62 of 75 GiB. A step takes 16 minutes there at
least at the longest prompts and responses, and four at prompts of 1,216 and responses of 300 tokens
on average (BUILD.md's length model). Attention's scores go through memory, and cuDNN's kernel
(`--config.model.attention=cudnn`), which spares that, could not be compiled without a GPU.
"""

from spatial_ssrl_jax import config as c


def get_config() -> c.Config:
    """360 steps of 256 prompts x 5 samples; what is not set here is the paper's by default."""
    return c.Config(
        name="grpo_3b",
        model=c.ModelSettings(path="runs/sft_3b/export", attention_chunk=256),
        data=c.DataSettings(
            source="shuffle,flip,crop@folder:data/coco"
            "+depth,position@diode:data/diode+depth,position@megadepth:data/megadepth",
            transparency="drop",
            min_pixels=262_144,
            max_pixels=4_194_304,
            prompt_buckets=(960, 1824, 4096),
        ),
        tasks=c.released_tasks(),
        grpo=c.GrpoSettings(),
        rollout=c.RolloutSettings(tensor=2),
        eval=c.EvalSettings(examples=64, every=5),
    )
