"""GRPO of Qwen2.5-VL-3B on questions and a reward of one's own, for one GPU of 24 to 48 GB.

    python -m spatial_ssrl_jax.train --config=configs/own_questions.py \
        --config.data.source=questions:MY_FOLDER

Copy it and write your own `reward`; BUILD.md, "Your own questions and rewards", goes through it.
Settings are those of `grpo_3b_lora.py`, without a cold start. It has not been run on the real
weights.
"""

from dataclasses import replace
from pathlib import Path

from spatial_ssrl_jax import config as c
from spatial_ssrl_jax.tasks.answers import last_box, number
from spatial_ssrl_jax.tasks.example import Example


def reward(response: str, answer: str, example: Example, tokens: int) -> dict[str, float]:
    """Half for a number in the box, and the other half the nearer it is to the right one."""
    given, right = number(last_box(response) or ""), number(answer)
    if given is None or right is None:
        return {"boxed": 0.0, "near": 0.0}
    error = abs(given - right) / max(abs(right), 1.0)
    return {"boxed": 0.5, "near": 0.5 * max(0.0, 1.0 - error)}


def get_config() -> c.Config:
    """`grpo_3b_lora.py` with `reward`, from the base model."""
    base = c.load_config(str(Path(__file__).with_name("grpo_3b_lora.py")))
    return replace(
        base,
        name="own_questions",
        sft=replace(base.sft, steps=0),
        reward=c.RewardSettings(rule="numeric", function=reward),
    )
