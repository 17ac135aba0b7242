"""Extracts the answer of a response: from its last `\\boxed{…}`, or from a short direct answer.

A response that reasons is never searched for a letter or a number as a whole: its reasoning may
hold several. Without an answer nothing is guessed.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from spatial_ssrl_jax.tasks.answers import last_box

_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}"
)
_ESCAPED, _SPACE = re.compile(r"\\([%$&#])"), re.compile(r"\\[,;:! ]|~")
# Pairs of marks around an answer without a meaning: emphasis, code, quotes, LaTeX.
_PAIRS = (("*", "*"), ("_", "_"), ("`", "`"), ('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"))
_LATEX = (("$", "$"), ("\\(", "\\)"))
THOUGHT_END = "</think>"
_REASONED = ("<think>", THOUGHT_END, "\\boxed")
_KIT_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_VERB = r"(?:is|was|would be|should be|must be|seems|appears|looks)"
_DECLARED = re.compile(
    rf"(?:\b(?:answer|option|choice)\b(?:\s+(?:{_VERB}|option))*\s*:?\s*"
    r"|(?:答案|选择|选项|选)(?:应该)?[是为]?\s*:?\s*)"
    r"[*(\[\"'`\s]*([A-Z])(?=[*)\]\"'`\s]*(?:$|[.,;:\n)。，/]|because\b|since\b|as\b|or\b|and\b))",
    re.IGNORECASE | re.MULTILINE,
)
# "B is correct", "Option B because …": a letter that a whole response is about.
_LEADING = re.compile(
    r"(?:[Oo]ption\s+|[Cc]hoice\s+)?[(\[]?([A-Z])[)\]]?,?\s+"
    rf"(?:{_VERB}\s+(?!not\b|wrong\b|incorrect\b)|because\b|since\b)"
)
_DENIED = re.compile(r"\b(?:not|neither|nor|isn't|wrong|incorrect)\b", re.IGNORECASE)
_ENCLOSED = re.compile(r"\(([^()]*)\)")
_BARE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,]?")
_LETTERED = re.compile(r"(?:[(\[]([A-Z])[)\]]|([A-Z])[.:)\]])(?=\s|[*]|$)", re.IGNORECASE)
# Another letter behind one: "A or B", "(A), (B)", "A/B"; "B, A is wrong" is about B alone.
_ANOTHER = re.compile(
    r"[*)\]\"'`.\s]*(?:,|/|;|&|\bor\b|\band\b|\bnor\b)[\s,]*(?:or\s+|and\s+|option\s+)*"
    rf"[*(\[\"'`]*[A-Za-z](?![\w'’-])(?!\s+{_VERB}\b)",
    re.IGNORECASE,
)
# A letter by itself. "A chair" begins with an article, which no verb or conjunction can follow.
_NO_NOUN = rf"(?:{_VERB}|are|and|or|nor|but|because|since|as|if|which|that)"
_ALONE = re.compile(
    rf"(?<![\w'’-])([A-Z])(?![\w'’-])(?!(?<=A)\s+(?!{_NO_NOUN}\b)[a-z])(?!(?<=I)\s+[a-z])"
)
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
_SCALAR = re.compile(r"\\?scalar\s*\{([^{}]*)\}")
_UNIT = re.compile(r"\\?(?:distance_)?unit\s*\{([^{}]*)\}")
_MEASURE = re.compile(r"([\d.,]+(?:\s*[-–]\s*[\d.,]+)?)\s*([A-Za-z]+)\.?")
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
    """`\\text{a}` as `a`, from the inside out, and `62\\%`, `12{,}345` and spaces as they look."""
    before = None
    while before != text:
        before, text = text, _TEXT.sub(r"\1", text)
    text = _SPACE.sub(" ", text.replace("{,}", ","))
    return _ESCAPED.sub(r"\1", text)


def choice(response: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a response chooses.

    In this order: a letter that fills the first or last line, the last letter that is declared
    ("the answer is B"), a letter in front, with its delimiter ("A. chair", "(A) chair") or a verb
    ("A is correct"), the text of just one option, and a letter alone in a box or in a few words.
    None where there is none, where several are named ("A or B", "neither A nor B"), or where the
    letter is of no option.

    Args:
      response: the model's text.
      options: text of each option by letter; where it is empty, any of A to Z may be chosen.
    """
    answer = final_answer(response)
    if answer is None:
        return None
    text = unicodedata.normalize("NFKC", answer.text)  # Ａ and （ as A and (
    if match := _ENCLOSED.fullmatch(text):
        text = match[1].strip()
    written = _written_letters(text)
    if len(written) > 1:
        return None
    letter = written.pop() if written else _by_text(text, options)
    if letter is None and (answer.boxed or len(text.split()) <= _FEW_WORDS):
        alone = set(_ALONE.findall(text)) & (set(options) or set(_ALONE.findall(text)))
        letter = alone.pop() if len(alone) == 1 and not _DENIED.search(text) else None
    return letter if letter is None or not options or letter in options else None


def kit_choice(response: str, options: Mapping[str, str]) -> str | None:
    """The letter that VLMEvalKit's exact matching reads behind the last `</think>`, boxed or not.

    The only letter of an option that is a word there, else that of the only option whose text
    occurs; None where there is none, or no `</think>`. The article "A" counts as a letter.

    Args:
      response: the model's text.
      options: text of each option by letter.
    """
    _, end, text = response.rpartition(THOUGHT_END)
    words = text.translate(_KIT_MARKS).split()
    found = [letter for letter in options if letter in words]
    if len(found) != 1:
        found = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return found[0] if end and len(found) == 1 else None


def _written_letters(text: str) -> set[str]:
    """The letters that the form of a text names as its answer: none, one, or those of a hedge."""
    lines = text.splitlines() or [""]
    if bare := {m[1].upper() for i in (0, -1) if (m := _BARE.fullmatch(unwrap(lines[i])))}:
        return bare
    declared = list(_DECLARED.finditer(text))
    match = declared[-1] if declared else _LETTERED.match(text) or _LEADING.match(text)
    if match is None:
        return set()
    letter = next(filter(None, match.groups())).upper()
    ends = [m.end(1) for m in declared] or [match.end(match.lastindex or 1)]
    return {letter, "another"} if any(_ANOTHER.match(text, end) for end in ends) else {letter}


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    plain = _plain(text)
    same = [
        letter
        for letter, option in options.items()
        if plain in (_plain(option), _plain(f"{letter} {option}"))
    ]
    return same[0] if len(same) == 1 else None


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", unwrap(text))
    return " ".join(text.casefold().split()).rstrip(".")


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
    """Centimetres from the last `\\scalar{…} \\distance_unit{…}`, else from a box with a number and
    its unit, such as `\\boxed{3 \\text{ feet}}`; of a range the middle.

    QSpatial-plus asks for the first form with or without reasoning.
    """
    text = _without_text(response)
    scalars, units = _SCALAR.findall(text), _UNIT.findall(text)
    if scalars and units:
        return _length(scalars[-1], units[-1])
    box = last_box(response)
    plain = _UNIT.sub(r" \1", _without_text(box or ""))
    match = _MEASURE.fullmatch(unwrap(plain))
    return _length(*match.groups()) if match else None


def _length(number: str, unit: str) -> float | None:
    """Centimetres of a number or a range; None where either cannot be read."""
    # A hyphen between two numbers is a range, not a sign.
    values = _numbers(re.sub(r"(?<=\d)\s*[-–]\s*(?=\d)", " ", number))
    scale = centimetres(unit)
    return sum(values) / len(values) * scale if values and scale else None


def centimetres(unit: str) -> float | None:
    """How many centimetres a unit of length is; None where it is not known."""
    return _UNITS_IN_CM.get(unit.strip(" .").casefold())
