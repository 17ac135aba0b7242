"""Answers in responses: their `\\boxed{…}`, and a normal form to compare them in."""

import re

_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_BOX = "\\boxed{"


def plain_answer(text: str) -> str:
    """An answer without white space, `\\text{…}`, outer parentheses and a last full stop."""
    text = "".join(_TEXT.sub(r"\1", text).split()).removesuffix(".")
    while text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    return text


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
