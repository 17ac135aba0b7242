"""Answers of VLMEvalKit and lmms-eval: scored as our own, for the right question or not at all."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from spatial_ssrl_jax.eval.benchmarks.registry import open_benchmark
from spatial_ssrl_jax.eval.predictions import as_line
from spatial_ssrl_jax.eval.questions import unscored_prediction
from tests.helpers import benchmark_files as files
from tests.helpers import tool_answers as tools

# Of each benchmark that VLMEvalKit has: its dataset's name, its table, and our own question file.
KIT = {
    "spatial457": ("Spatial457", files.write_spatial457, files.write_spatial457),
    "3dsrbench": ("3DSRBench", files.write_3dsrbench, files.write_3dsrbench),
    "viewspatial": ("ViewSpatialBench", files.write_viewspatial_tsv, files.write_viewspatial),
    "vsi_bench": ("VSI-Bench_32frame", files.write_vsi_tsv, files.write_vsi),
    "mmbench": ("MMBench_DEV_EN_V11", files.write_mmbench, files.write_mmbench),
    "blink": ("BLINK", files.write_blink, files.write_blink),
    "hallusionbench": ("HallusionBench", files.write_hallusion_tsv, files.write_hallusion),
    "ocrbench": ("OCRBench", files.write_ocrbench_tsv, files.write_ocrbench),
    "chartqa": ("ChartQA_TEST", files.write_chartqa, files.write_chartqa),
}
MODEL = "Model-7B"


# VLMEvalKit's tables


@pytest.mark.parametrize("name", KIT)
def test_a_table_of_the_kit_is_scored_as_our_own_answers(
    scored: Callable, name: str, tmp_path: Path
):
    """By its own questions, and by those of our file, which may have another layout and ids."""
    dataset, write_theirs, write_ours = KIT[name]
    (tmp_path / "theirs").mkdir(), (tmp_path / "ours").mkdir()
    theirs = write_theirs(tmp_path / "theirs")
    answers = ["The answer is A.", "The answer is B."]
    given = tools.write_kit_table(tmp_path / f"{MODEL}_{dataset}.tsv", theirs, answers)
    benchmark = open_benchmark(name, write_ours(tmp_path / "ours"))
    found, said = scored(tmp_path / "out", given, f"--data={tmp_path / 'ours'}")
    assert f"VLMEvalKit's answers to {len(benchmark.questions)} questions of" in said
    own = [unscored_prediction(q, benchmark.prompt(q), "") for q in benchmark.questions]
    for mine, yours in zip(own, found, strict=True):
        assert (mine.id, mine.category, mine.target) == (yours.id, yours.category, yours.target)
        assert mine.meta == yours.meta and yours.response in answers
    alone, _ = scored(tmp_path / "alone", given)
    answered = [sorted((p.question, p.response) for p in each) for each in (alone, found)]
    assert answered[0] == answered[1]


@pytest.mark.parametrize("kind", ["xlsx", "tsv", "json"])
def test_each_format_of_the_kit(score: Callable, scored: Callable, kind: str, tmp_path: Path):
    questions = tools.write_blink(tmp_path)
    answers = [
        r"<think>so" + "\r\n" + r"</think>\boxed{A}",
        "",
        "B\nbecause",
        "Failed to obtain answer via API.",
    ]
    given = tools.write_kit_table(tmp_path / f"{MODEL}_BLINK.{kind}", questions, answers)
    found, said = scored(tmp_path / "out", given)
    texts = [p.response.replace("\r\n", "\n") for p in found]
    assert texts == [answer.replace("\r\n", "\n") for answer in answers]
    assert [p.id for p in found] == ["0", "1", "2", "3"] and [*found[0].meta["options"]] == [
        "A",
        "B",
    ]
    assert "empty answers, which are wrong: 1" in said
    assert "answers that say 'Failed to obtain answer', which are wrong: 1" in said
    code, printed, _ = score(f"--score={given}", "--json")
    assert code == 0 and json.loads(printed)["score"] == 25


def test_thoughts_that_the_kit_takes_apart_are_put_back(scored: Callable, tmp_path: Path):
    """So that SPLIT_THINK changes no score: an answer that was reasoned needs its box."""
    given = tools.write_kit_table(
        tmp_path / "M_BLINK.tsv", tools.write_blink(tmp_path), ["A"], thinking="perhaps B</think>"
    )
    found, _ = scored(tmp_path / "out", given)
    assert {p.response for p in found} == {"<think>perhaps B</think>A"}


def test_an_option_that_pandas_takes_for_missing_is_in_the_question_file(
    score: Callable, scored: Callable, tmp_path: Path
):
    """VLMEvalKit loses an option "None": the right answer has no option left in its table."""
    data = files.write_tsv(
        tmp_path / "BLINK.tsv", [files.mcq_row(0), files.mcq_row(1, "C", C="None")]
    )
    answers = tools.write_kit_table(tmp_path / "M_BLINK.tsv", data, ["The answer is C."])
    answers.write_text(answers.read_text().replace("None", ""))
    code, _, said = score("--score", answers)
    assert code == 2 and re.search(
        "row 2 of M_BLINK.tsv: its answer 'C' is none.*as --data.$", said
    )
    found, said = scored(tmp_path / "out", answers, f"--data={data}")
    scores = [json.loads(line)["score"] for line in (tmp_path / "out/predictions.jsonl").open()]
    assert scores == [0, 1] and len(found) == 2
    found, said = scored(tmp_path / "some", answers, "--allow-missing")
    assert [p.id for p in found] == ["0"] and "rows left out, of no question: 1" in said


# which question an answer is of


def test_rows_are_found_by_their_index_whatever_their_order(scored: Callable, tmp_path: Path):
    data = tools.write_blink(tmp_path)

    def change(rows: list[dict]) -> None:
        for row in rows:
            row["prediction"] = f"Answer of {row['index']}"
        random.Random(0).shuffle(rows)
        rows += [rows[0], {**rows[1], "index": "99"}]

    found, said = scored(tmp_path / "out", tools.write_table(tmp_path, change), f"--data={data}")
    assert [(p.id, p.response) for p in found] == [(str(i), f"Answer of {i}") for i in range(4)]
    assert "rows left out, of no question: 1; rows given twice: 1" in said


def test_rows_are_found_by_the_fields_that_an_id_is_made_of(scored: Callable, tmp_path: Path):
    """HallusionBench's rows in another order, numbered, with the six fields in columns."""
    theirs = files.write_hallusion_tsv(tmp_path, index=False)
    lines = theirs.read_text().splitlines(keepends=True)
    theirs.write_text("".join([lines[0], *lines[:0:-1]]))
    given = tools.write_kit_table(tmp_path / "M_HallusionBench.tsv", theirs, ["1", "0", "text"])
    data = tmp_path / "HallusionBench.json"
    found, said = scored(tmp_path / "out", given, f"--data={data}")
    answered = {p.id[-1]: p.response for p in found}
    assert answered == {"0": "0", "1": "1"} and "rows that are not asked: 1" in said


def test_ids_of_another_kind_leave_the_order_to_tell(scored: Callable, tmp_path: Path):
    """The Hub's ids of VSI-Bench have gaps: 0, 1, 3, … of the questions 0, 1, 2, …"""
    given = tools.write_table(
        tmp_path, lambda rows: [row.update(index=str(i * 3)) for i, row in enumerate(rows)]
    )
    found, _ = scored(tmp_path / "out", given, f"--data={tools.write_blink(tmp_path)}")
    assert [p.id for p in found] == ["0", "1", "2", "3"]


REFUSED = {
    "missing": (lambda rows: rows.pop(1), "answers 3 of the 4 questions of .* .not 1.: give all"),
    "text": (
        lambda rows: rows[2].update(question="What is it?"),
        "row 3 of M_BLINK.tsv asks 'What is it.', right answer 'A', and question 2 is 'What is 2.'",
    ),
    "text, in another order": (
        lambda rows: (rows.reverse(), rows[1].update(question="What is it?")),
        "row 2 of M_BLINK.tsv asks 'What is it.', right answer 'A', and question 2",
    ),
    "longer text": (
        lambda rows: rows[2].update(question="What is 2? And 3?"),
        "row 3 of M_BLINK.tsv asks",
    ),
    "right answer": (
        lambda rows: [row.update(answer="B") for row in rows[2:]],
        "row 3 of M_BLINK.tsv .* right answer 'B', and question 2 .* right answer 'A':",
    ),
    "twice": (
        lambda rows: rows.append({**rows[1], "prediction": "B"}),
        "row 5 of M_BLINK.tsv answers question 1 as row 2 of M_BLINK.tsv does, in other words",
    ),
    "column": (
        lambda rows: [row.pop("prediction") for row in rows],
        "has no column 'prediction' .but A, B, C, answer, category, index, question.: give its",
    ),
    "judged": (
        lambda rows: [row.update(hit="1") for row in rows],
        "table of judged answers, which may lack some: give its",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_table_of_other_questions_is_refused(score: Callable, kind: str, tmp_path: Path):
    change, message = REFUSED[kind]
    given = tools.write_table(tmp_path, change)
    code, out, err = score("--score", given, f"--data={tools.write_blink(tmp_path)}")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err), err


def test_missing_answers_are_left_out_when_allowed(scored: Callable, tmp_path: Path):
    given = tools.write_table(tmp_path, lambda rows: rows.pop(1))
    argv = (given, f"--data={tools.write_blink(tmp_path)}", "--allow-missing")
    found, said = scored(tmp_path / "out", *argv)
    assert [p.id for p in found] == ["0", "2", "3"]
    assert "questions left out, without an answer: 1" in said


def test_the_name_of_a_file_tells_its_benchmark_or_an_option_does(score: Callable, tmp_path: Path):
    given = tools.write_table(tmp_path, lambda rows: None, "answers.tsv")
    code, _, err = score("--score", given)
    assert code == 2 and "does not say of which benchmark it is: give --benchmark=NAME" in err
    code, out, _ = score("--score", given, "--benchmark=realworldqa")
    assert code == 0 and out.startswith("RealWorldQA: ")
    code, _, err = score("--score", given, "--benchmark=blonk")
    assert code == 2 and "--benchmark=blonk is none of spatial457, " in err
    named = tools.write_table(tmp_path, lambda rows: None, "RealWorldQA-tuned_SEEDBench2_Plus.tsv")
    assert score("--score", named)[1].startswith("SEEDBench2-Plus: ")


def test_mmbench_without_answers_becomes_a_submission(score: Callable, tmp_path: Path):
    data = files.write_mmbench(tmp_path, "MMBench_TEST_EN_V11.tsv", answer=False)
    given = tools.write_kit_table(tmp_path / "M_MMBench_TEST_EN_V11.tsv", data, ["B"])
    code, _, said = score("--score", given, f"--out={tmp_path / 'out'}")
    assert code == 0 and "submission.tsv: 4 answers without a public target" in said


# comparing, pages


def test_answers_of_two_tools_are_compared_with_our_own(score: Callable, tmp_path: Path):
    data = tools.write_blink(tmp_path)
    benchmark = open_benchmark("blink", data)
    own = [unscored_prediction(q, benchmark.prompt(q), "B") for q in benchmark.questions]
    ours = tmp_path / "predictions.jsonl"
    ours.write_text("".join(map(as_line, own)))
    lmms = tools.write_samples(
        tmp_path / "1_samples_blink.jsonl", [tools.sample(i) for i in range(4)]
    )
    for theirs in (tools.write_table(tmp_path, lambda rows: rows.reverse()), lmms):
        code, printed, err = score("--compare", ours, theirs, f"--data={data}", "--json")
        found = json.loads(printed)
        assert code == 0 and found["count"] == 4, err
        assert found["flipped"] == {"gained": ["0", "2"], "lost": ["1", "3"]}
    code, _, err = score("--compare", ours, ours, "--benchmark=blink")
    assert code == 2 and "--compare needs no --benchmark" in err


def test_a_page_has_the_images_that_are_there(scored: Callable, tmp_path: Path):
    given = tools.write_table(tmp_path, lambda rows: None)
    data = tools.write_blink(tmp_path)
    scored(tmp_path / "out", given, f"--data={data}")
    assert (tmp_path / "out" / "results.html").read_text().count("<img") == 4
    rows = [files.mcq_row(i, "AB"[i % 2], image="", image_path="gone.png") for i in range(4)]
    files.write_tsv(data, rows)
    _, said = scored(tmp_path / "none", given, f"--data={data}")
    assert "the page has no images: row 1 of BLINK.tsv: there is no gone.png" in said
    assert "<img" not in (tmp_path / "none" / "results.html").read_text()
