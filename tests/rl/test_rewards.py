"""The reward, on responses written by hand."""

import numpy as np
import pytest

from spatial_ssrl_jax.config.schema import RewardSettings
from spatial_ssrl_jax.rl.rewards import score_response
from spatial_ssrl_jax.tasks.answers import last_box, plain_answer
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
