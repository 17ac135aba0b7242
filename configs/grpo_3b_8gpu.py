"""The paper's GRPO of Qwen2.5-VL-3B, as `grpo_3b.py`, for one machine with eight 80 GB GPUs.

    python -m spatial_ssrl_jax.bench verify-kernels     # whether the kernels are right there
    SOURCE=shuffle,flip,crop@folder:COCO
    SOURCE+=+depth,position@diode:DIODE+depth,position@megadepth:MEGADEPTH
    launch/gpu.sh --config=configs/grpo_3b_8gpu.py --source=$SOURCE

Meant for H100s in one process: weights over `fsdp=8`, sampling with a copy of the weights on each.
It names the fused kernels, cuDNN's attention and the decode step's of Triton; where the first
command says that one is wrong or slower, add `--config.model.attention=xla` or
`--config.rollout.attention=xla`. Starts from `runs/sft_3b/export`, which `configs/sft_3b.py`
leaves. Published result: a mean of 50.54 over seven spatial benchmarks, from 45.91.

It has not been run, neither has cuDNN's attention as it is here nor Triton's on several GPUs, and
it is not planned: `plan` knows GPUs one at a time, and neither kernel without one.
"""

from dataclasses import replace
from pathlib import Path

from spatial_ssrl_jax import config as c


def get_config() -> c.Config:
    """`grpo_3b.py` with two rows a GPU in a micro-batch."""
    base = c.load_config(str(Path(__file__).with_name("grpo_3b.py")))
    return replace(
        base,
        name="grpo_3b_8gpu",
        model=replace(base.model, attention="cudnn", remat="full"),
        mesh=replace(base.mesh, fsdp=8),
        grpo=replace(base.grpo, micro_batch_rows=16),
        rollout=replace(base.rollout, tensor=1, attention="triton"),
    )
