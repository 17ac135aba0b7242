"""Each benchmark's metric on answers made by hand, with the traps that scoring can fall into."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.eval.benchmarks.charts_and_text import relaxed
from spatial_ssrl_jax.eval.benchmarks.registry import SPECS, open_benchmark, score_predictions
from spatial_ssrl_jax.eval.benchmarks.vsi_bench import relative_accuracy
from spatial_ssrl_jax.eval.questions import Prediction, unscored_prediction
from spatial_ssrl_jax.eval.scoring import scores
from spatial_ssrl_jax.eval.scoring.published import GENERAL, ROWS, SPATIAL, published
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT
from tests.helpers import benchmark_files as files

OPTIONS = {"A": "chair", "B": "table"}
KIT = ("blink", "realworldqa", "seedbench2_plus", "spatialeval", "3dsrbench")
FORMULA = "Handwritten Mathematical Expression Recognition"


def prediction(
    benchmark: str, target, response: str, category: str = "all", name="0", **meta
) -> Prediction:
    return Prediction(name, benchmark, category, "?", target, response, meta)


def judged(*given, **more) -> tuple[str | None, bool, float]:
    """What one response is found to say, whether it can be read, and its score."""
    (found,), _ = score_predictions([prediction(*given, **more)])
    return found.extracted, found.parsed, found.score


def numbered(predictions: list[Prediction]) -> list[Prediction]:
    return [dataclasses.replace(r, id=str(i)) for i, r in enumerate(predictions)]


# multiple choice


@pytest.mark.parametrize("benchmark", [*KIT, "viewspatial", "whatsup"])
def test_choices(benchmark: str):
    def ask(target: str, response: str):
        return judged(benchmark, target, response, options=OPTIONS)

    assert ask("A", "A. chair") == ("A", True, 1)
    assert ask("A", r"<think>B? No.</think>\boxed{\text{A. chair}}") == ("A", True, 1)
    assert ask("A", r"\boxed{(B)}") == ("B", True, 0)
    # The released scripts count these: any A in the output, or in the reasoning.
    assert ask("A", "A chair is seen, and Also A table") == (None, False, 0)
    assert ask("A", "<think>A is near, so A.</think>") == (None, False, 0)
    assert ask("A", "BAD") == (None, False, 0)
    # A box that ends at the first brace would be read as "\text{B".
    assert ask("B", r"\boxed{\text{B}. table}") == ("B", True, 1)
    assert ask("B. table", "B") == ("B", True, 1)


def test_lines_of_a_question_are_not_taken_for_options():
    asked = "Question: Who was it?\nI. Newton or another?"
    given = dataclasses.replace(prediction("blink", "B", "B"), question=asked)
    assert score_predictions([given])[1].score == 100


def test_options_are_taken_from_the_prompt_where_meta_has_none():
    asked = "Question: What?\nOptions:\nA. chair\nB. table\nPlease select"
    given = dataclasses.replace(prediction("blink", "B", r"\boxed{table}"), question=asked)
    (found,), _ = score_predictions([given])
    assert (found.extracted, found.score) == ("B", 1)


def test_3dsrbench_is_plain_and_also_gives_the_stricter_figures():
    """Two questions; of the second only its mirrored image in one order is answered wrongly."""
    qids = [f"ABCDEF0{q}{kind}" for q in (0, 1) for kind in ("", "-1", "-flip", "-flip-1")]
    predictions = [
        prediction("3dsrbench", "A", "B" if qid == "ABCDEF01-flip-1" else "A", name=qid, qid=qid)
        for qid in qids
    ]
    _, found = score_predictions(predictions)
    assert found.score == found.extra["vanilla"] == 100 * 7 / 8
    assert found.extra["flip"] == 75  # (00, 00-1, 01, 01-1): the last is wrong
    assert found.extra["circular"] == 75  # (00, 00-flip, 01, 01-flip)
    assert found.extra["flip_circular"] == 50


def test_mmbench_needs_every_rotation():
    def ask(*responses: tuple[str, str]):
        return [prediction("mmbench", "A", response, name=name) for name, response in responses]

    predictions = ask(("241", "A"), ("1000241", "A"), ("252", "A"), ("1000252", "B"), ("7", "A"))
    _, found = score_predictions(predictions)
    assert found.score == pytest.approx(100 * 2 / 3)
    assert found.extra == {"vanilla": 80} and found.count == 5
    by_meta = [dataclasses.replace(r, meta={"group": 1}) for r in numbered(predictions)]
    assert score_predictions(by_meta)[1].score == 0
    with pytest.raises(UserError, match="its meta has no group"):
        score_predictions([prediction("mmbench", "A", "A", name="x1")])


# reasoning: with_unboxed


@pytest.mark.parametrize("benchmark", [*KIT, "mmbench"])
def test_an_unboxed_letter_counts_in_a_second_score_alone(benchmark: str):
    """One boxed, one unboxed, one unboxed and wrong, one cut off, and one that hedges."""
    responses = (r"\boxed{A}", "It is A.", "B", None, "A or B")
    predictions = [
        prediction(
            benchmark,
            "A",
            "<think>A" if said is None else f"<think>A or B?</think>{said}",
            name=str(index),
            options=OPTIONS,
        )
        for index, said in enumerate(responses)
    ]
    scored, found = score_predictions(predictions)
    assert found.score == 20 and found.unparsed == 4
    assert [p.extracted for p in scored] == ["A", None, None, None, None]
    assert found.extra["with_unboxed"] == 40
    direct = [dataclasses.replace(p, response="A") for p in predictions]
    assert "with_unboxed" not in score_predictions(direct)[1].extra


def test_an_answer_that_is_found_stands_whatever_the_kit_reads():
    """The kit finds two letters behind the thought, and so none."""
    given = prediction("blink", "A", r"<think>x</think>Not B: \boxed{A}", options=OPTIONS)
    assert score_predictions([given])[1].extra == {"with_unboxed": 100}


def test_rotations_need_unboxed_letters_in_all():
    def ask(*said: str) -> float:
        predictions = [
            prediction("mmbench", "A", f"<think>x</think>{text}", name=name, options=OPTIONS)
            for name, text in zip(("1", "1000001", "2"), said, strict=True)
        ]
        return score_predictions(predictions)[1].extra["with_unboxed"]

    assert ask("A", r"\boxed{A}", "A") == 100 and ask("A", "B", "A") == 50


# short answers


@pytest.mark.parametrize(
    ("target", "response", "extracted", "score"),
    [
        ("Yes", "Yes", "Yes", 1),
        ("yes", r"<think>no</think>\boxed{\text{Yes}}", "Yes", 1),
        ("Yes", "3", "3", 1),
        ("Yes", "0", "0", 0),
        ("No", "0", "0", 1),
        ("No", "none", "none", 1),
        ("3", "three", "three", 1),
        ("10", "{'Reasoning': 'one, two', 'Answer': 10}", "10", 1),
        ("3", "{'Reasoning': 'I see 4', 'Answer': '3'}", "3", 1),
        ("red", '{"Reasoning": "blue", "Answer": "Red"}', "Red", 1),
        ("sedan", "minivan", "minivan", 1),
        ("school bus", "double bus", "double bus", 1),
        ("road bike", "school bus", "school bus", 0),
        ("large", r"\boxed{Answer: large}", "large", 1),
        ("red", "blue", "blue", 0),
        ("red", "The red one is in front of the blue one.", None, 0),
        ("red", "<think>red</think>", None, 0),
    ],
)
def test_spatial457(target: str, response: str, extracted: str | None, score: float):
    found = judged("spatial457", target, response, "L1_single")
    assert found == (extracted, extracted is not None, score)


@pytest.mark.parametrize(
    ("length", "unit", "score", "stricter"),
    [
        ("50", "cm", 1, 100),
        ("0.5", "meters", 1, 100),
        ("80", "cm", 1, 0),
        ("99.9", "cm", 1, 0),
        ("100", "cm", 0, 0),  # twice as much is too much
        ("25", "cm", 0, 0),
        ("0", "cm", 0, 0),
    ],
)
def test_qspatial_plus(length: str, unit: str, score: float, stricter: float):
    response = rf"\scalar{{{length}}} \distance_unit{{{unit}}}"
    (one,), found = score_predictions([prediction("qspatial_plus", "50 cm", response)])
    assert (one.score, found.score, one.parsed) == (score, 100 * score, True)
    assert found.extra == {"within_1.5": stricter}


def test_qspatial_plus_without_a_unit_is_unparsed():
    assert judged("qspatial_plus", "50 cm", "50 cm") == (None, False, 0)
    with pytest.raises(UserError, match="its target '50' is no length"):
        judged("qspatial_plus", "50", r"\scalar{50} \distance_unit{cm}")


# VSI-Bench


def test_relative_accuracy_by_hand():
    assert relative_accuracy(10, 10) == 1
    assert relative_accuracy(9.5, 10) == 1  # off by 0.05, the limit of θ = 0.95
    assert relative_accuracy(9.4, 10) == relative_accuracy(9.4, 10, strict=True) == 0.9
    assert relative_accuracy(3, 2) == 0.1  # off by 0.5, the limit of θ = 0.5
    assert relative_accuracy(3, 2, strict=True) == 0
    assert relative_accuracy(7, 10) == 0.5  # limits 0.3, 0.35, …, 0.5
    assert relative_accuracy(100, 10) == 0


def test_at_exact_limits_rounding_decides_as_in_both_scripts():
    """Off by 0, 5, … 50 %: the official ≤ misses 20 and 45 %, the paper's < counts 5 and 30 %."""
    official = [1, 1, 0.9, 0.8, 0.6, 0.6, 0.5, 0.4, 0.3, 0.1, 0.1]
    paper = [1, 1, 0.8, 0.7, 0.6, 0.5, 0.5, 0.3, 0.2, 0.1, 0]
    for sign in (-5, 5):
        numbers = [100 + sign * i for i in range(11)]
        assert [relative_accuracy(number, 100) for number in numbers] == official
        assert [relative_accuracy(number, 100, strict=True) for number in numbers] == paper


def test_vsi_bench_is_the_mean_of_eight_tasks_and_the_papers_of_all_questions():
    right, wrong = "A", "B"
    easy, medium, hard = (f"object_rel_direction_{x}" for x in ("easy", "medium", "hard"))
    predictions = numbered(
        [
            prediction("vsi_bench", "A", right, easy, options=OPTIONS),
            prediction("vsi_bench", "A", right, easy, options=OPTIONS),
            prediction("vsi_bench", "A", wrong, medium, options=OPTIONS),
            prediction("vsi_bench", "A", wrong, hard, options=OPTIONS),
            prediction("vsi_bench", "2", "3", "object_counting"),
            prediction("vsi_bench", "A", r"\boxed{A. left}", "route_planning", options=OPTIONS),
        ]
    )
    scored, found = score_predictions(predictions)
    assert [r.score for r in scored] == [1, 1, 0, 0, 0.1, 1]
    assert found.score == pytest.approx(100 * (1 / 3 + 0.1 + 1) / 3)
    assert found.extra["paper"] == pytest.approx(100 * 3 / 6)
    assert found.categories[easy] == {"score": pytest.approx(100), "count": 2}


def test_vsi_bench_reads_what_its_type_asks_for():
    """The released script takes any single letter for a choice, whatever was asked."""
    assert judged("vsi_bench", "4", "A", "object_counting") == (None, False, 0)
    assert judged("vsi_bench", "A", "4", "route_planning", options=OPTIONS) == (None, False, 0)
    assert judged("vsi_bench", "4", "There are 4 chairs", "object_counting") == ("4", True, 1)
    assert judged("vsi_bench", "4", "3 or 4", "object_counting") == (None, False, 0)
    for target, kind, message in (
        ("0", "object_counting", "no number above 0"),
        ("A", "object_counting", "no number above 0"),
        ("A", "color", "not of VSI-Bench's"),
    ):
        with pytest.raises(UserError, match=message):
            judged("vsi_bench", target, "1", kind)


# general benchmarks


def test_hallusionbench_by_hand():
    """Two figures with two questions each; one answer is wrong and one has neither yes nor no."""
    responses = {
        ("1", "0"): "Yes",
        ("1", "1"): "No.",
        ("2", "0"): "Yes, it is",
        ("2", "1"): "Perhaps",
    }
    predictions = [
        prediction(
            "hallusionbench",
            "Yes" if question == "0" else "No",
            response,
            "VS",
            name=f"{figure}{question}",
            subcategory="chart",
            set_id="0",
            figure_id=figure,
            question_id=question,
        )
        for (figure, question), response in responses.items()
    ]
    _, found = score_predictions(predictions)
    assert found.extra == {"aAcc": 75, "fAcc": 50, "qAcc": 50}
    assert found.score == pytest.approx((75 + 50 + 50) / 3) and found.unparsed == 1
    # The same numbers in another category are another set.
    meta = {**predictions[3].meta, "subcategory": "map"}
    apart = [*predictions[:3], dataclasses.replace(predictions[3], meta=meta)]
    assert score_predictions(apart)[1].extra["fAcc"] == pytest.approx(100 * 2 / 3)
    with pytest.raises(UserError, match="its meta has no set_id, figure_id, question_id"):
        score_predictions([dataclasses.replace(predictions[0], meta={})])


@pytest.mark.parametrize(
    ("target", "response", "category", "score"),
    [
        ("CENTRE", "The word is Centre.", "Regular Text Recognition", 1),
        (["ANTONIOS", "ANTONIO'S"], "antonio's", "Irregular Text Recognition", 1),
        ("CENTRE", r"<think>or CENTER</think>\boxed{\text{centre}}", "Doc-oriented VQA", 1),
        ("CENTRE", r"<think>CENTRE?</think>\boxed{CENTER}", "Doc-oriented VQA", 0),
        ("$5", "$5", "Key Information Extraction", 1),
        ("a b", "a\nb", "Scene Text-centric VQA", 1),
        ("x ^ 2 = 4\n", "$x^{2}$ or x^2=4", FORMULA, 1),
        (r"\text{a} = 1", r"\text{a}=1", FORMULA, 1),
        ("X = 4", "x=4", FORMULA, 0),
    ],
)
def test_ocrbench(target, response: str, category: str, score: float):
    assert judged("ocrbench", target, response, category)[1:] == (True, score)


def test_ocrbench_does_not_search_the_reasoning():
    thought = "<think>CENTRE</think>"
    assert judged("ocrbench", "CENTRE", thought, "Doc-oriented VQA") == (None, False, 0)


def test_relaxed_match_is_relative_to_the_true_number():
    assert relaxed("105", "100") and relaxed("95", "100")
    assert not relaxed("105.1", "100") and not relaxed("94.9", "100")
    # With its arguments swapped these two come out the other way round.
    assert not relaxed("100", "95") and relaxed("100", "105.2")
    assert relaxed("0", "0.0") and not relaxed("0.01", "0")
    assert relaxed("-4.9", "-5") and not relaxed("5", "-5")
    assert relaxed("14%", "0.14") and not relaxed("14%", "14")
    assert relaxed("Italy", "italy") and not relaxed("Italy", "France")
    assert not relaxed("about 14", "14")


@pytest.mark.parametrize(
    ("response", "target", "right", "released"),
    [
        (r"\boxed{62\%}", "62%", 1, 0),  # the released code drops the sign of the answer alone
        (r"\boxed{62\%}", "62", 0, 1),
        (r"\boxed{31,846}", "31846", 1, 1),
        (r"\boxed{\$57}", "57", 1, 0),
        (r"\boxed{12{,}345}", "12345", 1, 0),
        (r"\boxed{\text{Yes}}", "yes", 1, 1),
        (r"\boxed{1:4}", "0.25", 0, 1),
        (r"\boxed{100}", "95", 0, 1),  # within 5 % of what is found, not of what is true
        (r"\boxed{95}", "100", 1, 0),
        ("<think>14", "14", 0, 0),
        ("14", "14", 1, 1),
    ],
)
def test_chartqa_by_its_own_rule_and_by_the_released_one(response, target, right, released):
    made = prediction("chartqa", target, response, split="human")
    other = prediction("chartqa", "1", "1", split="augmented", name="2")
    _, scores = score_predictions([made, other])
    assert scores.score == 50 * right + 50
    assert scores.extra["paper"] == 50 * released + 50


def test_chartqa_is_the_mean_of_both_halves():
    predictions = numbered(
        [
            prediction("chartqa", "14", "14.5", split="test_human"),
            prediction(
                "chartqa", "14", r"<think>14</think>\boxed{\text{Yes}.}", split="test_human"
            ),
            prediction("chartqa", "Yes", "yes.", split="test_human"),
            prediction("chartqa", "14", "<think>14", "augmented"),
        ]
    )
    _, found = score_predictions(predictions)
    assert found.score == pytest.approx(100 * (2 / 3 + 0) / 2) and found.unparsed == 1
    with pytest.raises(UserError, match="neither human nor augmented"):
        score_predictions([prediction("chartqa", "14", "14", "test")])


# scores


@pytest.mark.parametrize("name", SPECS)
def test_all_right_and_all_wrong(name: str, tmp_path: Path):
    """From the question files to the scores: right answers give 100, and empty ones 0."""
    benchmark = open_benchmark(name, files.WRITERS[name](tmp_path))
    predictions = []
    for question in benchmark.questions:
        target = question.target[0] if isinstance(question.target, list) else question.target
        response = rf"\boxed{{{target}}}"
        if name == "qspatial_plus":
            response = r"\scalar{{{}}} \distance_unit{{{}}}".format(*target.split())
        predictions.append(
            unscored_prediction(question, benchmark.prompt(question, "reasoning"), response)
        )
    scored, found = benchmark.score(predictions)
    assert found.score == pytest.approx(100) and found.ci95 == pytest.approx((100, 100))
    assert (found.count, found.unparsed) == (len(predictions), 0)
    assert sum(part["count"] for part in found.categories.values()) == len(predictions)
    assert all(r.parsed and r.score == 1 for r in scored)
    empty = [dataclasses.replace(r, response="") for r in predictions]
    scored, found = benchmark.score(empty)
    assert (found.score, found.unparsed, found.ci95) == (0, len(predictions), (0, 0))
    assert not any(r.parsed or r.score for r in scored)


def test_several_samples_give_their_mean():
    """Each sample has a score of its own; a question's samples are drawn together."""
    responses = {"4": "AA", "5": "AB", "6": "BB"}
    predictions = [
        prediction("blink", "A", letter, name=name, options=OPTIONS, sample=number)
        for name, letters in responses.items()
        for number, letter in enumerate(letters, 1)
    ]
    _, found = score_predictions(predictions)
    assert found.score == pytest.approx(50) and (found.count, found.unparsed) == (3, 0)
    assert found.categories == {"all": {"score": pytest.approx(50), "count": 3}}
    # Right in both rotations: in the first sample, and not in the second.
    turned = [
        prediction("mmbench", "A", letter, name=name, options=OPTIONS, group=1, sample=number)
        for number, letters in ((1, "AA"), (2, "AB"))
        for name, letter in zip(("1", "1000001"), letters, strict=True)
    ]
    _, found = score_predictions(turned)
    assert found.score == 50 and found.extra == {"vanilla": 75}
    with pytest.raises(UserError, match="the id '4, sample 2' occurs 2 times"):
        score_predictions([*predictions, predictions[1]])


def test_the_pretext_tasks_count_alike_and_stand_beside_chance():
    """Two right of two, and one of two: the mean of the tasks, whatever their number."""
    source = {"spec": "scenes", "record": "1"}
    rows = [
        ("flip", "vertical", "1-0", r"<think>x</think>\boxed{1-0}", 0.125),
        ("shuffle", "1x3", "0-2-1", r"\boxed{ 0-2-1 }", 0.2),
        ("shuffle", "2x2", "0-2-1-3", r"\boxed{0-2-3-1}", 1 / 23),
    ]
    predictions = numbered(
        [
            prediction(
                "pretext",
                target,
                response,
                f"{t}/{k}",
                task=t,
                kind=k,
                source=source,
                chance=chance,
            )
            for t, k, target, response, chance in rows
        ]
    )
    _, found = score_predictions(predictions)
    assert found.score == 75 and found.extra["shuffle"] == 50 and found.extra["flip"] == 100
    assert found.extra["chance/shuffle/1x3"] == pytest.approx(20)
    assert found.extra["chance/shuffle"] == pytest.approx(100 * (0.2 + 1 / 23) / 2)
    short = prediction(
        "pretext", "A", "A", "crop", task="crop", kind="crop", source=source, chance=0.25
    )
    assert score_predictions([short])[1].score == 100, "asked directly, a short answer will do"
    thought = dataclasses.replace(short, question=f"? {FORMAT_PROMPT}")
    assert score_predictions([thought])[1].score == 0, "asked for a box, it will not"


def test_unparsed_is_wrong_and_counted():
    predictions = numbered(
        [prediction("blink", "A", response, options=OPTIONS) for response in ("A", "B", "?", "")]
    )
    _, found = score_predictions(predictions)
    assert (found.score, found.count, found.unparsed) == (25, 4, 2)


def test_the_interval_is_that_of_the_mean():
    """400 questions, half of them right: 50 ± 1.96 · 50/√400, and the same each time."""
    cells = [(i, "all", float(i % 2)) for i in range(400)]
    low, high = scores.interval(cells)
    assert low == pytest.approx(50 - 4.9, abs=0.8) and high == pytest.approx(50 + 4.9, abs=0.8)
    assert scores.interval(cells) == (low, high) != scores.interval(cells, seed=1)


def test_units_are_drawn_as_a_whole():
    """100 groups of four equal cells say no more than 100 cells, and their interval is as wide."""
    alone = scores.interval([(i, "all", float(i % 2)) for i in range(100)])
    together = scores.interval([(i // 4, "all", float(i // 4 % 2)) for i in range(400)])
    assert np.subtract(*alone) == pytest.approx(np.subtract(*together), abs=2.0)


def test_the_interval_covers_a_mean_of_parts():
    """Two parts of one weight each, whatever their size; the small one makes it wide."""
    cells = [(i, "big", 1.0) for i in range(300)] + [(1000 + i, "small", i % 2) for i in range(10)]
    assert scores.mean(cells) == 75
    low, high = scores.interval(cells)
    assert low < 65 and high > 85
    assert scores.mean(cells, {"big": 3.0}) == pytest.approx(87.5)


def test_records_of_several_benchmarks_or_none_are_refused():
    for predictions, message in (
        ([], "found none"),
        (
            [prediction("blink", "A", "A"), prediction("chartqa", "1", "1", name="1")],
            "blink, chartqa",
        ),
        ([prediction("blonk", "A", "A")], "unknown benchmark 'blonk'"),
        (
            [prediction("blink", "A", "A"), prediction("blink", "A", "A")],
            "the id '0' occurs 2 times",
        ),
        ([prediction("blink", None, "A")], "0 has no target"),
        ([prediction("blink", "4", "A")], "its target '4' is no letter of an option"),
        ([prediction("hallusionbench", "Maybe", "Yes")], "neither Yes nor No"),
    ):
        with pytest.raises(UserError, match=message):
            score_predictions(predictions)


def test_the_papers_rows_are_whole():
    """Each row's mean is the published one."""
    means = [45.91, 44.85, 50.54, 52.69, 49.58, 56.58]
    spatial = [row for row in ROWS if set(row.scores) == set(SPATIAL)]
    assert [np.mean(list(row.scores.values())) for row in spatial] == pytest.approx(means, abs=0.01)
    assert {*SPATIAL, *GENERAL} == set(SPECS)
    assert len(published("spatial457")) == 6 and len(published("blink")) == 4
    assert published("ocrbench")["Spatial-SSRL-7B"] == 89.6
