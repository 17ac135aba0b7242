"""Extraction: what counts as an answer, and that nothing is guessed where there is none."""

import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from spatial_ssrl_jax.eval.scoring import extract

OPTIONS = {"A": "chair", "B": "table", "C": "left of the sofa"}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("A", "A"),
        ("b", "B"),
        ("(A)", "A"),
        ("A. chair", "A"),
        ("(B) table", "B"),
        ("B: table", "B"),
        ("**A. chair**", "A"),
        ("table", "B"),
        ("Left of the sofa.", "C"),
        ("It is B", "B"),
        ("B\n\nThe chair is seen left of A, so that it is nearer.", "B"),
        ("The chair is seen left of A, so that it is nearer.\n\n**B**", "B"),
        (r"\boxed{\text{A chair}}", "A"),
        ("The answer is B.", "B"),
        ("Answer: **C**", "C"),
        ("The table is nearer, so the correct option is (B)", "B"),
        (r"\boxed{A. chair}", "A"),
        (r"\boxed{\text{A. chair}}", "A"),
        (r"\boxed{\text{(A)}}", "A"),
        (r"\boxed{\mathrm{\text{B}}}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{table}", "B"),
        (r"$\boxed{B}$", "B"),
        (r"\boxed{Option B}", "B"),
        (r"<think>A is near. \boxed{A}?</think>\boxed{B}", "B"),
    ],
)
def test_a_choice_is_found(response: str, letter: str):
    assert extract.choice(response, OPTIONS) == letter


@pytest.mark.parametrize(
    "response",
    [
        "",
        "D",  # no such option
        r"\boxed{D. lamp}",
        "A chair is in front of the table, but I cannot tell.",
        "A table",
        "Seen from A and from B it may be either of them, or C.",
        "(A) or (B)",
        "(   )",
        "The answer is A chair that I cannot see",
        "<think>It must be A.</think>",  # reasons, and boxes nothing
        "<think>It must be A. The answer is A.",
        r"<think>So it is A.</think>\boxed{A",  # cut off
        r"<think>So it is A.</think>\boxed{}",
        r"<think>So it is A.</think>\boxed{\frac{1}{2}}",
    ],
)
def test_nothing_is_guessed(response: str):
    assert extract.choice(response, OPTIONS) is None


CHOSEN = (
    "{}", "({})", "[{}]", "{}.", "{})", "**{}**", "$\\text{{{}}}$", "{}. thing", "({}) thing",
    "{}: thing",
    "Answer: {}", "answer: {}.", "Answer: ({})", "**Answer:** {}", "The answer is {}.",
    "The answer is ({}).", "The correct answer is {}", "The correct option is {}.", "Option {}",
    "Option {}.", "option {} is correct.", "{} is correct.", "{} is the correct answer.",
    "{} is the right choice because the thing is nearer to the camera than all the others.",
    "Option {} is correct.", "{} because the thing is in front of everything else here.",
    "{}, because it is nearer.", "It is {}.", "I choose {}.", "I would pick {}", "My choice is {}.",
    "The thing is nearer, so the answer is {}", "The thing is nearer.\n\n{}", "{}\n\nIt is nearer.",
    "选{}", "选{}。", "选择{}", "答案是{}。", "答案:{}", "答案：{}",
    "\\boxed{{{}}}", "\\boxed{{({})}}", "\\boxed{{\\text{{{}}}}}", "\\boxed{{{} is correct}}",
    "\\boxed{{Option {}}}", "\\boxed{{The answer is {}}}",
    "<think>Maybe not.</think> \\boxed{{{}}}",
)  # fmt: skip
SMALL = ("answer: {}", "Answer: {}.", "option {}", "Option {}.", "{}", "({})", "The answer is {}.")
HEDGED = (
    "{} or {}", "Both {} and {}", "Neither {} nor {}", "Either {} or {}", "{} and {}", "{}/{}",
    "{}, {}", "({}) or ({})", "({}), ({})", "Answer: {}, {}", "Answer: {} or {}",
    "Answer: ({}) or ({})",
    "The answer is {} or {}.", "The answer is either {} or {}.", "Option {} or option {}",
    "Options {} and {}", "It is {} or {}.", "{} or {} is correct.", "选{}或{}", "{}\nor\n{}",
    "\\boxed{{{} or {}}}", "\\boxed{{{}, {}}}", "\\boxed{{{} and {}}}",
    "\\boxed{{Neither {} nor {}}}",
)  # fmt: skip
DENIED = ("Not {}", "{} is not correct.", "{} is wrong.", "\\boxed{{not {}}}")
LETTERS = {letter: f"thing {letter.lower()}{letter.lower()}" for letter in "ABCD"}


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("template", CHOSEN)
def test_a_choice_is_read_whatever_its_letter(template: str, letter: str):
    assert extract.choice(template.format(letter), LETTERS) == letter
    wide = chr(ord(letter) - ord("A") + ord("Ａ"))
    assert extract.choice(template.format(wide), LETTERS) == letter


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("template", SMALL)
def test_small_letters_are_read_where_an_answer_is_declared(template: str, letter: str):
    assert extract.choice(template.format(letter.lower()), LETTERS) == letter


@pytest.mark.parametrize("pair", ["AB", "BA", "AC", "CD", "DA", "BC"])
@pytest.mark.parametrize("template", HEDGED)
def test_two_letters_are_no_answer(template: str, pair: str):
    assert extract.choice(template.format(*pair), LETTERS) is None


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("template", DENIED)
def test_a_letter_that_is_denied_is_no_answer(template: str, letter: str):
    assert extract.choice(template.format(letter), LETTERS) is None


# Whether VLMEvalKit's exact matching reads a letter: one that is a word, else one option's text.
KIT = {
    "{}": True, "({})": True, "The answer is {}.": True, "**{}**": True, "{}: thing": True,
    "It is {}, not further.": True, "\\boxed{{{}": True, "\\boxed{{{}}}": True,
    "I see that {} is nearer": True, "{}'s": False, "{}/x": False, "answer:{}": True,
    "option{}": False, "It is thing {0}{0}.": True,
}  # fmt: skip


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("template", KIT)
def test_what_the_kit_reads_behind_the_thought(template: str, letter: str):
    text = template.format(letter)
    expected = letter if KIT[template] else None
    assert extract.kit_choice(f"<think>A, B, C or D?</think>{text}", LETTERS) == expected
    assert extract.kit_choice(f"<think>A</think>B, no.</think>\n{text}", LETTERS) == expected
    assert extract.kit_choice(text, LETTERS) is None  # no thought ended
    assert extract.kit_choice(f"{text}</think>", LETTERS) is None
    other = "BADC"["ABCD".index(letter)]
    assert extract.kit_choice(f"</think>{letter} or {other}", LETTERS) is None
    assert extract.kit_choice(f"</think>{letter.lower()}", LETTERS) is None


words = st.text(string.ascii_letters + " .,\n()", max_size=80)


@given(st.sampled_from("ABC"), words, st.sampled_from(["{}", r"\text{{{}}}", "({})", "{}. {}"]))
def test_the_box_decides_whatever_is_thought(letter: str, thought: str, form: str):
    inside = form.format(letter, OPTIONS[letter]) if form.count("{}") == 2 else form.format(letter)
    response = rf"<think>{thought}</think>\boxed{{{inside}}}"
    assert extract.choice(response, OPTIONS) == letter


@given(words)
def test_a_thought_without_a_box_answers_nothing(thought: str):
    response = f"<think>{thought}</think>"
    assert extract.choice(response, OPTIONS) is None
    assert extract.number(response) is None
    assert extract.yes_or_no(response) is None


@given(st.text(max_size=60))
def test_a_letter_that_is_found_is_of_an_option(response: str):
    assert extract.choice(response, OPTIONS) in (None, *OPTIONS)
    assert extract.choice(rf"\boxed{{{response}}}", OPTIONS) in (None, *OPTIONS)


@given(st.text(string.ascii_letters + " ", min_size=1), st.integers(0, 4))
def test_unwrapping_undoes_text(text: str, depth: int):
    assume(text.strip())
    wrapped = text
    for _ in range(depth):
        wrapped = rf"\text{{{wrapped}}}"
    assert extract.unwrap(wrapped) == text.strip()


UNITS = {
    "meters": 100, "meter": 100, "m": 100, "metres": 100, "cm": 1, "centimeters": 1, "mm": 0.1,
    "millimeters": 0.1, "feet": 30.48, "foot": 30.48, "ft": 30.48, "inches": 2.54, "in": 2.54,
}  # fmt: skip
LENGTHS = (
    "\\boxed{{3 \\text{{ {}}}}}", "\\boxed{{3 \\, \\text{{{}}}}}", "\\boxed{{3\\ \\mathrm{{{}}}}}",
    "\\boxed{{3 \\distance_unit{{{}}}}}", "\\scalar{{3}} \\unit{{{}}}", "\\boxed{{3 {}}}",
    "\\scalar{{3}} \\distance_unit{{{}}}", "\\boxed{{\\scalar{{3}} \\distance_unit{{{}}}}}",
    "<think>1 m or 2 m</think> \\boxed{{3 {}.}}", "\\boxed{{2-4 {}}}",
)  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("template", LENGTHS)
def test_lengths_are_read_in_every_form_and_unit(template: str, unit: str):
    assert extract.distance(template.format(unit)) == pytest.approx(3 * UNITS[unit])


@pytest.mark.parametrize(
    "response", [r"\boxed{3}", r"\boxed{3 parsecs}", r"\boxed{3 or 4 m}", "3 m", r"\boxed{m}", ""]
)
def test_no_length_is_guessed(response: str):
    assert extract.distance(response) is None


def test_marks_of_one_side_belong_to_the_answer():
    assert extract.unwrap("$5") == "$5" and extract.unwrap("$5$") == "5"
    assert extract.unwrap('12 inch"') == '12 inch"'


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("4", 4),
        ("4.5 meters", 4.5),
        ("about 1,200 cm", 1200),
        ("26.4 m2", 26.4),
        ("26.4 m^2", 26.4),
        ("There are two chairs.", 2),
        (r"<think>1, 2, 3</think>\boxed{\text{3.5}}", 3.5),
        ("12.", 12),
        ("-2", -2),
    ],
)
def test_a_number_is_found(response: str, value: float):
    assert extract.number(response) == value


@pytest.mark.parametrize("response", ["", "2 to 3", "3-4", "1/2", "none", "<think>3", r"\boxed{x}"])
def test_no_number_is_guessed(response: str):
    assert extract.number(response) is None


@given(st.floats(0.01, 1e6).map(lambda x: round(x, 3)))
def test_any_number_is_read_back(value: float):
    assert extract.number(f"{value:.3f} m") == pytest.approx(value)
    assert extract.number(rf"\boxed{{{value:,.3f}}}") == pytest.approx(value)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Yes", "Yes"),
        ("No, there is no such thing.", "No"),
        ("Yes, and there is no other.", "Yes"),
        ("There is no table", "No"),
        (r"<think>yes</think>\boxed{\text{No}}", "No"),
        ("Yes or no", None),
        ("It cannot be said", None),
        ("Nothing", None),
    ],
)
def test_yes_or_no(response: str, expected: str | None):
    assert extract.yes_or_no(response) == expected


@pytest.mark.parametrize(
    ("response", "length"),
    [
        (r"\scalar{50} \distance_unit{cm}", 50),
        (r"\scalar{1.5} \distance_unit{Meters}", 150),
        (r"\scalar{2} \distance_unit{\text{feet}}", 60.96),
        (r"\scalar{1-2} \distance_unit{inches}", 3.81),
        (r"as \scalar{scalar} \distance_unit{distance unit}: \scalar{3} \distance_unit{mm}", 0.3),
        (r"\boxed{\scalar{5} \distance_unit{inch}}", 12.7),
        (r"\scalar{scalar} \distance_unit{distance unit}", None),
        (r"\scalar{5} \distance_unit{parsec}", None),
        (r"\scalar{5}", None),
        ("about 5 cm", None),
    ],
)
def test_distances_in_centimetres(response: str, length: float | None):
    found = extract.distance(response)
    assert found == (length if length is None else pytest.approx(length))
