"""The reward, on responses written by hand."""

import numpy as np
import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import RewardSettings
from spatial_ssrl_jax.rl.rewards import check_rules, score_answer, score_response
from spatial_ssrl_jax.tasks.answers import grade_order, last_box, plain_answer
from spatial_ssrl_jax.tasks.example import Example

GOOD = "<think>left is 2</think>\\boxed{2-0-1-3}"
PICTURE = np.zeros((2, 2, 3), np.uint8)


def rate(response: str, answer: str = "2-0-1-3", tokens: int = 9, **settings):
    example = Example("shuffle", "2x2", (PICTURE,), "?", answer, "", {}, {})
    return score_response(response, tokens, example, RewardSettings(**settings))


@pytest.mark.parametrize(
    ("response", "accuracy", "form"),
    [
        (GOOD, 1, 1),
        ("<think>a\nb</think> so \\boxed{2-0-1-3} is it", 1, 1),
        ("< think >a</ think >\\boxed{ 2-0-1-3 }", 1, 1),  # white space around < > / goes first
        (" " + GOOD, 1, 1),  # also in front of the first tag
        ("I say " + GOOD, 1, 0),  # the form must begin with the first character
        ("<think>a</think>\\boxed{2 - 0-1-3}", 0, 1),
        ("<think>a</think>\\boxed{1}\\boxed{2-0-1-3}", 1, 1),
        ("<think>a</think>\\boxed{2-0-1-3}\\boxed{1}", 0, 1),  # the last box counts
        ("<think>a</think>\\boxed{2-0-1-3} or \\boxed{1", 0, 1),  # also where it is not closed
        ("<think></think>\\boxed{}", 0, 1),  # known looseness
        ("<think>\\boxed{2-0-1-3}</think>", 1, 0),  # known looseness: a box inside the thought
        ("<think>a</think>\\boxed{\\text{2-0-1-3}}", 0, 1),
        ("<think>a</think>\\boxed{2-0-1-3", 0, 0),
        ("2-0-1-3", 0, 0),
        ("", 0, 0),
    ],
)
def test_score(response, accuracy, form):
    reward = rate(response)
    assert (reward.accuracy, reward.format) == (accuracy, form)
    assert reward.overall == pytest.approx(0.9 * accuracy + 0.1 * form)


@pytest.mark.parametrize(
    ("response", "accuracy", "form"),
    [
        (GOOD, 1, 1),
        ("<think></think>\\boxed{2-0-1-3}", 0, 0),
        ("<think>a</think>\\boxed{}", 0, 0),
        ("<think>\\boxed{2-0-1-3}</think>", 0, 0),
        ("<think>\\boxed{2-0-1-3}</think>\\boxed{1}", 0, 1),
        ("<think>a<think>b</think>\\boxed{2-0-1-3}", 0, 0),
    ],
)
def test_strict(response, accuracy, form):
    reward = rate(response, rule="strict")
    assert (reward.accuracy, reward.format) == (accuracy, form)


@pytest.mark.parametrize("box", ["2 - 0-1-3", "\\text{2-0-1-3}", "(2-0-1-3).", "2-0-1-3"])
def test_tolerant(box):
    response = f"<think>a</think>\\boxed{{{box}}}"
    assert rate(response, rule="tolerant").accuracy == 1
    assert rate(response).accuracy == (box == "2-0-1-3")
    assert rate("\\boxed{2-0-3-1}", rule="tolerant").accuracy == 0


@pytest.mark.parametrize(
    ("box", "accuracy"),
    [("100", 1), ("101", 1), ("101.1", 0), ("$99.5$ cm", 1), ("1,00", 0), ("about", 0),
     ("1,000", 0), ("100,", 1), (".5", 0),
     ("100 or 5", 0), ("\\text{1e2}", 1), ("-100", 0)],
)  # fmt: skip
def test_numeric(box, accuracy):
    reward = rate(f"<think>a</think>\\boxed{{{box}}}", "100", rule="numeric")
    assert (reward.accuracy, reward.format) == (accuracy, 1)


def test_the_tolerance_of_numbers():
    response = "<think>a</think>\\boxed{109}"
    assert rate(response, "100", rule="numeric", tolerance=0.1).accuracy == 1
    assert rate(response, "100", rule="numeric", tolerance=0.0).accuracy == 0


@pytest.mark.parametrize(
    ("box", "accuracy"),
    [("B", 1), ("(B)", 1), ("B. the red one", 1), ("\\text{B}", 1), ("option B", 1), ("A", 0),
     ("Both", 0), ("B or C", 0), ("", 0), ("b", 0)],
)  # fmt: skip
def test_choice(box, accuracy):
    for answer in ("B", "(B)", "B. the red one"):
        reward = rate(f"<think>a</think>\\boxed{{{box}}}", answer, rule="choice")
        assert (reward.accuracy, reward.format) == (accuracy, 1)


@pytest.mark.parametrize(
    ("box", "accuracy"),
    [("\\frac{1}{2}", 1), ("0.5", 1), ("\\frac{2}{4}", 1), ("2", 0), ("", 0)],
)
def test_math(box, accuracy):
    pytest.importorskip("math_verify")
    reward = rate(f"<think>a</think>\\boxed{{{box}}}", "\\frac12", rule="math")
    assert (reward.accuracy, reward.format) == (accuracy, 1)


def test_a_rule_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_rules(RewardSettings())
    for settings in (RewardSettings(rule="math"), RewardSettings(question_rule="math")):
        with pytest.raises(UserError, match=r"spatial_ssrl_jax\[math\]"):
            check_rules(settings)


def test_questions_may_have_a_rule_of_their_own():
    settings = RewardSettings(question_rule="numeric")
    for task, box, accuracy in (("questions", "4.0", 1), ("flip", "4.0", 0), ("flip", "4", 1)):
        example = Example(task, "", (), "?", "4", "", {}, {})
        response = f"<think>a</think>\\boxed{{{box}}}"
        assert score_response(response, 9, example, settings).accuracy == accuracy


@pytest.mark.parametrize(
    ("box", "credit"),
    [
        ("2-0-1-3", 1.0),
        ("2-0-3-1", 0.2 * 2 / 4),
        ("0-2-3-1", 0.0),
        ("(2 - 1-0-3)", 0.2 * 2 / 4),
        ("2-0-1-1", 0.0),  # no order of the labels
        ("2-0-1", 0.0),
        ("", 0.0),
    ],
)
def test_partial_credit(box, credit):
    response = f"<think>a</think>\\boxed{{{box}}}"
    example = Example("shuffle", "2x2", (PICTURE,), "?", "2-0-1-3", "", {}, {})
    found = score_response(response, 9, example, RewardSettings(partial_credit=True), grade_order)
    assert found.accuracy == (credit == 1)  # metrics stay exact
    assert found.overall == pytest.approx(0.9 * credit + 0.1)
    plain = score_response(response, 9, example, RewardSettings(), grade_order)
    assert plain.overall == pytest.approx(0.9 * (credit == 1) + 0.1)


def test_strict_gives_no_part_for_a_box_that_does_not_count():
    settings = RewardSettings(rule="strict", partial_credit=True)
    for response, overall in (
        ("<think>a</think>\\boxed{2-1-0}", 0.9 * 0.2 / 3 + 0.1),
        ("<think>\\boxed{2-0-1}</think>b", 0.0),
        ("\\boxed{2-1-0}", 0.0),
    ):
        found = score_answer(response, "2-0-1", settings, grade_order)
        assert found.overall == pytest.approx(overall)


def test_plain_answer():
    assert plain_answer(" (\\text{A}). ") == "A"
    assert plain_answer("1-2") != plain_answer("12")


def test_task_factor_and_length_penalty():
    assert rate(GOOD, task_weights={"shuffle": 0.5}).overall == pytest.approx(0.5)
    how = {"length_penalty": 0.4, "length_penalty_start": 10, "length_penalty_span": 20}
    for tokens, off in ((10, 0.0), (20, 0.2), (30, 0.4), (99, 0.4)):
        assert rate(GOOD, tokens=tokens, **how).overall == pytest.approx(1 - off)


def test_last_box_balances_braces():
    assert last_box("\\boxed{a{b}c} \\boxed{ {x}{y} }") == "{x}{y}"
    assert last_box("\\boxed{a} \\boxed{b") == "a"
    assert last_box("boxed{a}") is None
