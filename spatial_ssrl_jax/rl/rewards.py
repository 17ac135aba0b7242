"""The verifiable reward: is the answer right, and does the response have the required format."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from spatial_ssrl_jax.config.schema import RewardRule, RewardSettings
from spatial_ssrl_jax.tasks.answers import final_box, last_box, plain_answer
from spatial_ssrl_jax.tasks.example import Example

_AROUND_TAGS = re.compile(r"\s*([<>/])\s*")

_FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)

_STRICT_FORMAT = re.compile(r"<think>(?P<thought>.*)</think>(?P<rest>.*)", re.DOTALL)


@dataclass(frozen=True)
class Reward:
    """Reward of one response; `accuracy` and `format` are 0 or 1."""

    overall: float
    accuracy: float
    format: float


def score_answer(response: str, answer: str, settings: RewardSettings | None = None) -> Reward:
    """Scores one response by its answer and format alone.

    Args:
      response: the text without special tokens.
      answer: the right one.
      settings: the config's `reward` section, of which task weights and length penalty are not
        used; None is the paper's.
    """
    settings = settings or RewardSettings()
    accuracy, has_format = REWARD_RULES[settings.rule](_AROUND_TAGS.sub(r"\1", response), answer)
    overall = settings.accuracy_weight * accuracy + (1 - settings.accuracy_weight) * has_format
    return Reward(overall, float(accuracy), float(has_format))


def score_response(
    response: str, tokens: int, example: Example, settings: RewardSettings
) -> Reward:
    """Scores one response to an example, with its task's weight and the length penalty.

    Args:
      response: the sampled text without special tokens.
      tokens: its length, the end token included.
      example: the question with its task, answer and truth.
      settings: the config's `reward` section.
    """
    reward = score_answer(response, example.answer, settings)
    overall = reward.overall * settings.task_weights.get(example.task, 1.0)
    if settings.length_penalty:
        over = (tokens - settings.length_penalty_start) / settings.length_penalty_span
        overall -= settings.length_penalty * min(max(over, 0.0), 1.0)
    return replace(reward, overall=overall)


def _paper(response: str, answer: str) -> tuple[bool, bool]:
    """The published rule with its looseness: an empty thought and box pass the format, and a box
    inside the thought can earn the accuracy. A last box that is not closed earns none."""
    return final_box(response) == answer, _FORMAT.fullmatch(response) is not None


def _strict(response: str, answer: str) -> tuple[bool, bool]:
    """One thought that is not empty, and after it a box that is not empty; no other box counts."""
    match = _STRICT_FORMAT.fullmatch(response)
    if match is None or not match["thought"].strip() or "<think>" in match["thought"]:
        return False, False
    box = last_box(match["rest"])
    return box == answer, bool(box)


def _tolerant(response: str, answer: str) -> tuple[bool, bool]:
    """The published format; the answer may have spaces, `\\text{…}` or parentheses around it."""
    box = last_box(response)
    right = box is not None and plain_answer(box) == plain_answer(answer)
    return right, _FORMAT.fullmatch(response) is not None


REWARD_RULES: dict[RewardRule, Callable[[str, str], tuple[bool, bool]]] = {
    "paper": _paper,
    "strict": _strict,
    "tolerant": _tolerant,
}
