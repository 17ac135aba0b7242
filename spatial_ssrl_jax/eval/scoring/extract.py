"""Extracts the answer of a response: from its last `\\boxed{…}`, or from a short direct answer.

A response that reasons is never searched for a letter or a number as a whole: its reasoning may
hold several. Without an answer nothing is guessed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from spatial_ssrl_jax.tasks.answers import last_box

_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}"
)
# Pairs of marks around an answer without a meaning: emphasis, code, quotes, LaTeX.
_PAIRS = (("*", "*"), ("_", "_"), ("`", "`"), ('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"))
_LATEX = (("$", "$"), ("\\(", "\\)"))
_REASONED = ("<think>", "</think>", "\\boxed")
_DECLARED = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+(?:is|would be|should be|option))*\s*:?\s*"
    r"[*(\[\"'`\s]*([A-Z])(?=[*)\]\"'`\s]*(?:$|[.,;:\n)]|because\b|since\b))",
    re.IGNORECASE | re.MULTILINE,
)
_ENCLOSED = re.compile(r"\(([^()]*)\)")
_BARE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,]?")
_LETTERED = re.compile(r"(?:[(\[]([A-Z])[)\]]|([A-Z])[.:)\]])(?=\s|[*]|$)", re.IGNORECASE)
_ANOTHER = re.compile(r"\s*(?:or|and|/)\s*[(\[]?[A-Za-z](?![\w'’-])")
# A letter by itself; "A chair" begins with an article, not with an option.
_ALONE = re.compile(r"(?<![\w'’-])([A-Z])(?![\w'’-])(?!(?<=[AI])\s+[a-z])")
_FEW_WORDS = 5
_OPTION_LINE = re.compile(r"^([A-Z])[.:)] ?(.+)$", re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?![\d])")
_UNITS_IN_CM = {
    **dict.fromkeys(("meters", "meter", "m", "metre", "metres"), 100.0),
    **dict.fromkeys(("centimeters", "centimeter", "centimetres", "centimetre", "cm"), 1.0),
    **dict.fromkeys(("millimeters", "millimeter", "millimetres", "millimetre", "mm"), 0.1),
    **dict.fromkeys(("feet", "foot", "ft"), 30.48),
    **dict.fromkeys(("inches", "inch", "in"), 2.54),
}
NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}


@dataclass(frozen=True)
class Answer:
    """The part of a response that answers.

    Attributes:
      text: its words, `\\text{…}` and marks around it removed.
      boxed: whether it was in a box.
    """

    text: str
    boxed: bool


def final_answer(response: str) -> Answer | None:
    """The last box with balanced braces; the whole response where it neither reasons nor boxes.

    None where a response reasons and has no such box, or where nothing is left.
    """
    box = last_box(response)
    if box is None and any(mark in response for mark in _REASONED):
        return None
    text = unwrap(response if box is None else box)
    return Answer(text, box is not None) if text else None


def unwrap(text: str) -> str:
    """Text without `\\text{…}` and its like, and without white space and marks around it."""
    text, before = _without_text(text).replace("**", "").strip(), None
    while before != text:
        before = text
        for start, end in _PAIRS + _LATEX:
            if len(text) > len(start + end) and text.startswith(start) and text.endswith(end):
                text = text[len(start) : -len(end)].strip()
    return text


def _without_text(text: str) -> str:
    """`\\text{a}` as `a`, from the inside out."""
    before = None
    while before != text:
        before, text = text, _TEXT.sub(r"\1", text)
    return text


def choice(response: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a response chooses.

    In this order: a letter that fills the first or last line, the last letter that is declared
    ("the answer is B"), a letter with its delimiter in front ("A. chair", "(A) chair", "A: chair"),
    the text of just one option, and a letter alone in a box or in a few words. None where there is
    none, or where the letter is of no option.

    Args:
      response: the model's text.
      options: text of each option by letter; where it is empty, any of A to Z may be chosen.
    """
    answer = final_answer(response)
    if answer is None:
        return None
    text = answer.text
    if match := _ENCLOSED.fullmatch(text):
        text = match[1].strip()
    letter = _written_letter(text)
    if letter is None:
        letter = _by_text(text, options)
    if letter is None and (answer.boxed or len(text.split()) <= _FEW_WORDS):
        alone = set(_ALONE.findall(text)) & (set(options) or set(_ALONE.findall(text)))
        letter = alone.pop() if len(alone) == 1 else None
    return letter if letter is None or not options or letter in options else None


def _written_letter(text: str) -> str | None:
    lines = text.splitlines() or [""]
    bare = {m[1].upper() for i in (0, -1) if (m := _BARE.fullmatch(unwrap(lines[i])))}
    if len(bare) == 1:
        return bare.pop()
    if declared := [m[1] for m in _DECLARED.finditer(text) if m[1].isupper()]:
        return declared[-1]
    match = _LETTERED.match(text)
    if match and _ANOTHER.match(text, match.end()):
        return None
    return (match[1] or match[2]).upper() if match else None


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    plain = _plain(text)
    same = [
        letter
        for letter, option in options.items()
        if plain in (_plain(option), _plain(f"{letter} {option}"))
    ]
    return same[0] if len(same) == 1 else None


def _plain(text: str) -> str:
    return " ".join(unwrap(text).casefold().split()).rstrip(".")


def options_in(question: str) -> dict[str, str]:
    """The options that a prompt lists, one a line, by letter."""
    return dict(_OPTION_LINE.findall(question))


def yes_or_no(response: str) -> str | None:
    """ "Yes" or "No": by the first word, or where only one of them occurs."""
    answer = final_answer(response)
    words = re.findall(r"\w+", answer.text.casefold()) if answer else []
    found = [word for word in words if word in ("yes", "no")]
    leads = found and words[0] == found[0] and words[1:2] != ["or"]
    return found[0].capitalize() if leads or len(set(found)) == 1 else None


def number(response: str) -> float | None:
    """The only number of an answer, in digits or as a word; None where there are several."""
    answer = final_answer(response)
    if answer is None:
        return None
    found = _numbers(answer.text)
    if not found:
        words = re.findall(r"\w+", answer.text.casefold())
        found = [float(NUMBER_WORDS[word]) for word in words if word in NUMBER_WORDS]
    return found[0] if len(found) == 1 else None


def _numbers(text: str) -> list[float]:
    text = re.sub(r"\^\{?\d+\}?", "", text)  # the exponent of a unit, as in m^2
    return [float(x.replace(",", "")) for x in _NUMBER.findall(text) if any(map(str.isdigit, x))]


def distance(response: str) -> float | None:
    """Centimetres from the last `\\scalar{…} \\distance_unit{…}`; of a range the middle.

    QSpatial-plus asks for this format with or without reasoning, so a box is not looked for.
    """
    text = _without_text(response)
    scalars = re.findall(r"scalar\s*\{([^{}]*)\}", text)
    units = re.findall(r"distance_unit\s*\{([^{}]*)\}", text)
    if not scalars or not units:
        return None
    # A hyphen between two numbers is a range, not a sign.
    values = _numbers(re.sub(r"(?<=\d)\s*[-–]\s*(?=\d)", " ", scalars[-1]))
    scale = centimetres(units[-1])
    return sum(values) / len(values) * scale if values and scale else None


def centimetres(unit: str) -> float | None:
    """How many centimetres a unit of length is; None where it is not known."""
    return _UNITS_IN_CM.get(unit.strip(" .").casefold())
