"""Two models question by question, on cases computed by hand."""

import dataclasses

import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.questions import Prediction
from spatial_ssrl_jax.eval.scoring.compare import change, compare, in_pairs, mcnemar


def answers(benchmark: str, responses: str | list[str], target="A", **more) -> list[Prediction]:
    """One prediction a response, numbered from 0."""
    return [
        Prediction(str(i), benchmark, more.get("category", "all"), "?", target, response, meta)
        for i, response in enumerate(responses)
        for meta in [more["meta"][i] if "meta" in more else {}]
    ]


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (1, 5, 2 * (1 + 6) / 64),  # of 6 coins one head or none, or as many tails
        (5, 1, 2 * (1 + 6) / 64),
        (0, 5, 2 / 32),
        (10, 0, 2 / 1024),
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemars_exact_test(lost: int, gained: int, p: float):
    assert mcnemar(lost, gained) == pytest.approx(p, rel=1e-12)


def test_every_question_is_named_by_what_became_of_it():
    """A has 1 of 6 right only where B fails, and B two where A fails; one answer has no letter."""
    found = compare(answers("blink", "AABBB?"), answers("blink", "ABAAB?"))
    wrong = "both wrong"
    assert found.changes == ["both right", "lost", "gained", "gained", wrong, wrong]
    assert (found.ids("gained"), found.ids("lost")) == (["2", "3"], ["1"])
    assert [scores.score for scores in found.scores] == pytest.approx([100 / 3, 50])
    assert found.difference == pytest.approx(100 / 6)
    assert found.p_value == pytest.approx(2 * (1 + 3) / 8)  # two gained, one lost
    assert found.as_json()["changes"] == {
        "gained": 2,
        "lost": 1,
        "both right": 1,
        "both partly right": 0,
        "both wrong": 2,
    }


def test_the_interval_is_of_the_difference_not_of_each_score():
    """Ten wrong in both widen each score's interval and not that of what changed."""
    same = answers("blink", "AB" * 10)
    found = compare(same, same)
    assert found.difference == 0 and found.ci95 == (0, 0) and found.p_value == 1
    low, high = found.scores[0].ci95
    assert high - low > 30
    better = compare(answers("blink", "B" * 20), answers("blink", "A" * 20))
    assert better.ci95 == (100, 100) and better.p_value == pytest.approx(2 / 2**20)


def test_the_interval_of_a_known_mixture():
    """20 gained and 10 lost of 100: 10 ± 1.96 · 100 · √(0.30 − 0.10²) / √100 = 10 ± 10.6."""
    found = compare(
        answers("blink", "B" * 20 + "A" * 80), answers("blink", "A" * 20 + "B" * 10 + "A" * 70)
    )
    assert found.difference == pytest.approx(10)
    assert found.ci95 == pytest.approx((-0.6, 20.6), abs=1.5)


def test_categories_are_compared_too():
    a, b = answers("blink", "AB"), answers("blink", "AA")
    a, b = ([r[0], dataclasses.replace(r[1], category="other")] for r in (a, b))
    assert compare(a, b).categories == {
        "all": {"a": 100, "b": 100, "difference": 0, "count": 1},
        "other": {"a": 0, "b": 100, "difference": 100, "count": 1},
    }


def test_scores_between_right_and_wrong_have_no_mcnemar_test():
    """Of 10: 5 is off by half and hits one limit of ten, 9 by a tenth and hits nine."""
    a = answers("vsi_bench", ["5", "10", "5"], "10", category="object_counting")
    b = answers("vsi_bench", ["9", "10", "5"], "10", category="object_counting")
    found = compare(a, b)
    assert found.changes == ["gained", "both right", "both partly right"]
    assert found.difference == pytest.approx(100 * 0.8 / 3)
    assert found.p_value is None and "right or wrong" in found.no_test
    assert found.as_json()["mcnemar_p"] is None


def test_rotations_are_tested_as_groups():
    """Of two groups one is lost by one wrong rotation; the other's answers change to no effect."""
    meta = [{"group": g} for g in (1, 1, 2, 2)]
    found = compare(answers("mmbench", "AAAB", meta=meta), answers("mmbench", "ABBA", meta=meta))
    assert found.changes == ["both right", "lost", "lost", "gained"]
    assert found.difference == -50 and found.p_value == 1.0  # one changed group of two


def test_questions_of_one_figure_are_not_tested_as_if_independent():
    meta = [{"set_id": "0", "figure_id": "1", "question_id": str(i)} for i in range(2)]
    found = compare(
        answers("hallusionbench", ["yes", "no"], "Yes", meta=meta),
        answers("hallusionbench", ["yes", "yes"], "Yes", meta=meta),
    )
    # aAcc 50 → 100, fAcc 0 → 100, qAcc 50 → 100
    assert found.difference == pytest.approx((50 + 100 + 50) / 3)
    assert found.p_value is None and "not independent" in found.no_test
    other = [{**m, "figure_id": m["question_id"]} for m in meta]
    with pytest.raises(UserError, match="group their questions differently"):
        compare(
            answers("hallusionbench", ["yes"] * 2, "Yes", meta=meta),
            answers("hallusionbench", ["yes"] * 2, "Yes", meta=other),
        )


def test_pairs_follow_as_order():
    a, b = answers("blink", "ABC"), answers("blink", "DEF")
    found = in_pairs(a, b[::-1])
    assert found == (a, b)


def test_questions_that_one_lacks_are_named_or_left_out():
    a, b = answers("blink", "ABCDEF"), answers("blink", "AB")
    more = [dataclasses.replace(b[0], id="x")]
    with pytest.raises(UserError, match=r"4 questions are \(2, 3, 4, …\) only in A: give"):
        in_pairs(a, b)
    with pytest.raises(UserError, match=r"1 question is \(x\) only in B: .*--allow-missing"):
        in_pairs(a, a + more)
    assert in_pairs(a, b + more, allow_missing=True) == (a[:2], b)
    with pytest.raises(UserError, match="only in A and 1 question is"):
        in_pairs(b, more, allow_missing=True)  # nothing is left


def test_what_cannot_be_compared_is_refused():
    a = answers("blink", "AB")
    with pytest.raises(UserError, match="A holds answers to blink and B to realworldqa"):
        in_pairs(a, answers("realworldqa", "AB"))
    with pytest.raises(UserError, match="right answer to 0 is 'A' in A and 'B' in B"):
        in_pairs(a, answers("blink", "AB", target="B"))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (0.0, 0.1, "gained"),
        (1.0, 0.9, "lost"),
        (1.0, 1.0, "both right"),
        (0.0, 0.0, "both wrong"),
        (0.3, 0.3, "both partly right"),
    ],
)
def test_change(a: float, b: float, expected: str):
    assert change(a, b) == expected


def test_other_categories_are_refused():
    a, b = answers("blink", "AB"), answers("blink", "AB", category="other")
    with pytest.raises(UserError, match='the category of 0 is "all" in A and "other" in B: ask'):
        in_pairs(a, b)
