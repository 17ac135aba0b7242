"""The reward, on responses written by hand."""

import pytest

from spatial_ssrl_jax.learn.reward import last_box, score

GOOD = "<think>left is 2</think>\\boxed{2-0-1-3}"


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
        ("<think></think>\\boxed{}", 0, 1),  # known looseness
        ("<think>\\boxed{2-0-1-3}</think>", 1, 0),  # known looseness: a box inside the thought
        ("<think>a</think>\\boxed{\\text{2-0-1-3}}", 0, 1),
        ("<think>a</think>\\boxed{2-0-1-3", 0, 0),
        ("2-0-1-3", 0, 0),
        ("", 0, 0),
    ],
)
def test_score(response, accuracy, form):
    reward = score(response, "2-0-1-3")
    assert (reward.accuracy, reward.format) == (accuracy, form)
    assert reward.overall == pytest.approx(0.9 * accuracy + 0.1 * form)


def test_last_box_balances_braces():
    assert last_box("\\boxed{a{b}c} \\boxed{ {x}{y} }") == "{x}{y}"
    assert last_box("\\boxed{a} \\boxed{b") == "a"
    assert last_box("boxed{a}") is None
