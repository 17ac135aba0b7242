"""Answers in responses: their `\\boxed{…}`, and a normal form to compare them in."""

import re

_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_BOX = "\\boxed{"
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_LETTER = re.compile(
    r"(?:[Oo]ption )?(?:\(([A-Z])\)(?:\s.*)?|([A-Z])(?:[.:)](?:\s.*)?)?)", re.DOTALL
)
_DISCOUNT = 0.2


def plain_answer(text: str) -> str:
    """An answer without white space, `\\text{…}`, outer parentheses and a last full stop."""
    text = "".join(_TEXT.sub(r"\1", text).split()).removesuffix(".")
    while text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    return text


def number(text: str) -> float | None:
    """The one number in a text, whatever its unit; None without one, or with several."""
    found = _NUMBER.findall(_TEXT.sub(r"\1", text))
    return float(found[0].replace(",", "")) if len(found) == 1 else None


def letter(text: str) -> str | None:
    """The letter of an option: `B`, `(B)`, `B. the red one`; None without one."""
    match = _LETTER.fullmatch(_TEXT.sub(r"\1", text).strip())
    return (match[1] or match[2]) if match else None


def grade_order(given: str, right: str) -> float:
    """What an order such as `2-0-1` earns where it is wrong: 0.2 times the fraction of its places
    that are right, and nothing if it is no order of the same labels (arXiv 2509.25190).

    Args:
      given: a response's answer.
      right: the right order.
    """
    found, wanted = plain_answer(given).split("-"), right.split("-")
    if sorted(found) != sorted(wanted):
        return 0.0
    return _DISCOUNT * sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def last_box(text: str) -> str | None:
    """The content of the last `\\boxed{…}` with balanced braces, stripped; None without one."""
    start = text.rfind(_BOX)
    while start >= 0:
        if (content := _content(text, start)) is not None:
            return content
        start = text.rfind(_BOX, 0, start)
    return None


def final_box(text: str) -> str | None:
    """The stripped content of the very last `\\boxed{`; None without one or its closing brace.

    As mathruler reads it, with which the paper's models were trained.
    """
    start = text.rfind(_BOX)
    return _content(text, start) if start >= 0 else None


def _content(text: str, start: int) -> str | None:
    """What the braces of the box at `start` hold, stripped; None where they are not balanced."""
    depth, begin = 1, start + len(_BOX)
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i].strip()
    return None
