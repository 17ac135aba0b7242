"""The verifiable reward: is the answer right, and does the response have the required format."""

import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import RewardFunction, RewardRule, RewardSettings
from spatial_ssrl_jax.tasks.answers import final_box, last_box, letter, number, plain_answer
from spatial_ssrl_jax.tasks.example import Example, Grade

_AROUND_TAGS = re.compile(r"\s*([<>/])\s*")

_FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)

MAX_PARTS = 32  # that a reward names, in one response and over a step

_PART_NAME = re.compile(r"[A-Za-z_]\w{0,39}", re.ASCII)

_STRICT_FORMAT = re.compile(r"<think>(?P<thought>.*)</think>(?P<rest>.*)", re.DOTALL)


@dataclass(frozen=True)
class Reward:
    """Reward of one response.

    Attributes:
      overall: what it earns.
      accuracy: 1 where the answer is right, else 0; or what `reward.function` says.
      format: likewise.
      parts: other parts that `reward.function` names.
      failure: why there is no reward; "" where there is.
    """

    overall: float
    accuracy: float
    format: float
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""


def score_answer(
    response: str,
    answer: str,
    settings: RewardSettings | None = None,
    grade: Grade | None = None,
    task: str = "",
) -> Reward:
    """Scores one response by its answer and format alone.

    Args:
      response: the text without special tokens.
      answer: the right one.
      settings: the config's `reward` section, of which function, task weights and length penalty
        are not used; None is the paper's.
      grade: of the task, used with `partial_credit`.
      task: its name, which may have a rule of its own.
    """
    settings = settings or RewardSettings()
    rule = settings.rule_of(task)
    response = _AROUND_TAGS.sub(r"\1", response)
    right, has_format = REWARD_RULES[rule](response, answer, settings)
    credit = float(right)
    # Of `strict`, a box counts only with the format.
    counts = has_format or rule != "strict"
    if settings.partial_credit and grade is not None and not right and counts:
        credit = grade(final_box(response) or "", answer)
    overall = settings.accuracy_weight * credit + (1 - settings.accuracy_weight) * has_format
    return Reward(overall, float(right), float(has_format))


def score_response(
    response: str,
    tokens: int,
    example: Example,
    settings: RewardSettings,
    grade: Grade | None = None,
) -> Reward:
    """Scores one response to an example, with its task's weight and the length penalty.

    Args:
      response: the sampled text without special tokens.
      tokens: its length, the end token included.
      example: the question with its task, answer and truth.
      settings: the config's `reward` section.
      grade: of the example's task.

    Raises:
      Exception: any that `reward.function` raises; `ValueError` where it gives no finite number.
    """
    reward = score_answer(response, example.answer, settings, grade, example.task)
    if settings.function is not None:
        reward = _own_reward(settings.function, response, tokens, example, reward)
    overall = reward.overall * settings.task_weights.get(example.task, 1.0)
    if settings.length_penalty:
        over = (tokens - settings.length_penalty_start) / settings.length_penalty_span
        overall -= settings.length_penalty * min(max(over, 0.0), 1.0)
    return replace(reward, overall=overall)


def _own_reward(
    function: RewardFunction, response: str, tokens: int, example: Example, rule: Reward
) -> Reward:
    """What a function gives; accuracy and format are the rule's unless it names them."""
    given = function(response, example.answer, example, tokens)
    parts = dict(given) if isinstance(given, Mapping) else {"overall": given}
    for name, value in parts.items():
        if not isinstance(value, (bool, int, float)) and not hasattr(value, "__float__"):
            raise ValueError(f"it gives {value!r} for {name}; expected a number")
        parts[name] = float(value)
        if not math.isfinite(parts[name]):
            raise ValueError(f"it gives {parts[name]} for {name}; expected a finite number")
        if not _PART_NAME.fullmatch(str(name)):
            raise ValueError(f"it names a part {name!r}; expected up to 40 letters, digits or _")
    if not 0 < len(parts) <= MAX_PARTS:
        raise ValueError(f"it gives {len(parts)} numbers; expected 1 to {MAX_PARTS}")
    overall = parts.pop("overall", None)
    overall = sum(parts.values()) if overall is None else overall
    accuracy = parts.pop("accuracy", rule.accuracy)
    return Reward(overall, accuracy, parts.pop("format", rule.format), parts)


def _paper(response: str, answer: str, settings: RewardSettings) -> tuple[bool, bool]:
    """The published rule with its looseness: an empty thought and box pass the format, and a box
    inside the thought can earn the accuracy. A last box that is not closed earns none."""
    return final_box(response) == answer, _has_format(response)


def _strict(response: str, answer: str, settings: RewardSettings) -> tuple[bool, bool]:
    """One thought that is not empty, and after it a box that is not empty; no other box counts."""
    match = _STRICT_FORMAT.fullmatch(response)
    if match is None or not match["thought"].strip() or "<think>" in match["thought"]:
        return False, False
    box = last_box(match["rest"])
    return box == answer, bool(box)


def _tolerant(response: str, answer: str, settings: RewardSettings) -> tuple[bool, bool]:
    """The answer may have spaces, `\\text{…}` or parentheses around it."""
    box = last_box(response)
    right = box is not None and plain_answer(box) == plain_answer(answer)
    return right, _has_format(response)


def _numeric(response: str, answer: str, settings: RewardSettings) -> tuple[bool, bool]:
    """The number in the box is within the tolerance of the right one."""
    given, wanted = number(last_box(response) or ""), number(answer)
    if given is None or wanted is None:
        return False, _has_format(response)
    return abs(given - wanted) <= settings.tolerance * abs(wanted), _has_format(response)


def _choice(response: str, answer: str, settings: RewardSettings) -> tuple[bool, bool]:
    """The letter in the box is the right one."""
    given = letter(last_box(response) or "")
    return given is not None and given == letter(answer), _has_format(response)


def _math(response: str, answer: str, settings: RewardSettings) -> tuple[bool, bool]:
    """The expression in the box equals the right one."""
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]  # an extra

    box = last_box(response)
    if box is None:
        return False, _has_format(response)
    # The limit of time is the worker's: theirs would need signals.
    given, wanted = (
        parse(f"\\boxed{{{text}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        for text in (box, answer)
    )
    return bool(verify(wanted, given, timeout_seconds=None)), _has_format(response)


def _has_format(response: str) -> bool:
    return _FORMAT.fullmatch(response) is not None


REWARD_RULES: dict[RewardRule, Callable[[str, str, RewardSettings], tuple[bool, bool]]] = {
    "paper": _paper,
    "strict": _strict,
    "tolerant": _tolerant,
    "numeric": _numeric,
    "choice": _choice,
    "math": _math,
}


def check_rules(settings: RewardSettings) -> None:
    """Raises `UserError` where a rule needs a package that is not installed."""
    if settings.needs_math_verify and importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "reward.rule=math needs the package math-verify: pip install "
            "'spatial_ssrl_jax[math]', or choose another rule."
        )
