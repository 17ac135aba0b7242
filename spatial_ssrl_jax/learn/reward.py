"""The verifiable reward: is the answer right, and does the response have the required form."""

import re
from dataclasses import dataclass

_AROUND_TAGS = re.compile(r"\s*([<>/])\s*")
_FORM = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
_BOX = "\\boxed{"


@dataclass(frozen=True)
class Reward:
    """Reward of one response; `accuracy` and `format` are 0 or 1."""

    overall: float
    accuracy: float
    format: float


def score(response: str, answer: str, accuracy_weight: float = 0.9) -> Reward:
    """Scores one response as the paper does.

    Known looseness of the published rule, kept: an empty thought and box pass the format, and a
    box inside the thought can earn the accuracy.

    Args:
      response: the sampled text without special tokens.
      answer: the exact right answer.
      accuracy_weight: weight of accuracy; the format has the rest.
    """
    response = _AROUND_TAGS.sub(r"\1", response)
    form = float(_FORM.fullmatch(response) is not None)
    accuracy = float(last_box(response) == answer)
    return Reward(accuracy_weight * accuracy + (1 - accuracy_weight) * form, accuracy, form)


def last_box(text: str) -> str | None:
    """What the last `\\boxed{…}` with balanced braces holds, stripped; None when there is none."""
    start = text.rfind(_BOX)
    while start >= 0:
        depth, begin = 1, start + len(_BOX)
        for i in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[begin:i].strip()
        start = text.rfind(_BOX, 0, start)
    return None
