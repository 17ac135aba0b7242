"""The paper's cold start of Qwen2.5-VL-7B: LoRA 128/256 on the language model, merged at the end.

    SOURCE=shuffle,flip,crop@folder:COCO
    SOURCE+=+depth,position@diode:DIODE+depth,position@megadepth:MEGADEPTH
    python -m spatial_ssrl_jax.train --config=configs/sft_7b.py \
        --config.data.source=$SOURCE

Responses are made from the tasks themselves unless `--config.sft.responses=FILE` names the released
cold-start JSON. Meant for a TPU v5e-32; it has not been run on the real weights.
"""

from dataclasses import replace
from pathlib import Path

from spatial_ssrl_jax import config as c


def get_config() -> c.Config:
    """`sft_3b.py` with the 7B, sharded over more chips.

    256 samples take up to 47 rows, two micro-batches of 32.
    """
    base = c.load_config(str(Path(__file__).with_name("sft_3b.py")))
    return replace(
        base,
        name="sft_7b",
        model=replace(base.model, path="Qwen/Qwen2.5-VL-7B-Instruct"),
        sft=replace(base.sft, micro_batch_rows=32),  # one a chip
        rollout=replace(base.rollout, tensor=4),
    )
