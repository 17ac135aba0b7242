"""lmms-eval's samples: what each release logs is scored, for the right question or not at all."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import benchmark_files as files
from tests.helpers import tool_answers as tools


@pytest.mark.parametrize(
    ("kept", "responses"),
    [
        ({"filtered_resps": "A"}, ["A"]),
        ({"filtered_resps": ["A"]}, ["A"]),
        ({"filtered_resps": "A", "resps": "<think>B</think>A"}, ["<think>B</think>A"]),
        ({"filtered_resps": ["A"], "resps": [["So A."]]}, ["So A."]),
        ({"filtered_resps": "A", "resps": ["So A.", "Or B."]}, ["So A.", "Or B."]),
        ({"filtered_resps": ["A"], "resps": [["So A.", "Or B."]]}, ["So A.", "Or B."]),
        ({"filtered_resps": "", "resps": None}, [""]),
    ],
)
def test_what_the_model_wrote_is_scored_as_each_release_logs_it(
    scored: Callable, kept: dict, responses: list[str], tmp_path: Path
):
    given = tools.write_samples(
        tmp_path / "1_samples_blink.jsonl", [tools.sample(i, **kept) for i in (1, 0, 3, 2)]
    )
    found, said = scored(tmp_path / "out", given, f"--data={tools.write_blink(tmp_path)}")
    assert [p.response for p in found] == responses * 4
    numbers = [None] if len(responses) == 1 else [1, 2]
    assert [p.meta.get("sample") for p in found] == numbers * 4
    assert [p.id for p in found[:: len(responses)]] == ["0", "1", "2", "3"]
    assert (
        found[0].question == tools.sample(0)["input"]
        and "lmms-eval's answers to 4 questions" in said
    )


def test_tasks_of_lmms_eval_are_parts_of_a_benchmark(
    score: Callable, scored: Callable, tmp_path: Path
):
    """A task numbers its own questions; those of all tasks are one benchmark's."""
    data = tools.write_blink(tmp_path, 4, ["Art_Style", "Counting"])
    rows = [{**tools.sample(i), "doc_id": i % 2, "filtered_resps": f"It is {i}"} for i in range(4)]
    given = [
        tools.write_samples(tmp_path / f"1_samples_blink_{task}.jsonl", some)
        for task, some in (("counting", rows[2:]), ("art_style", rows[:2]))
    ]
    found, _ = scored(tmp_path / "out", *given, f"--data={data}")
    assert sorted((p.id, p.response) for p in found) == [(str(i), f"It is {i}") for i in range(4)]
    code, _, err = score(
        "--score",
        *given,
        tools.write_samples(tmp_path / "2_samples_blink_counting.jsonl", rows[2:]),
        f"--data={data}",
    )
    assert code == 2 and "hold answers to blink: score them one by one" in err


def test_samples_that_log_their_questions_need_no_file(scored: Callable, tmp_path: Path):
    docs = [json.loads(line) for line in files.write_vsi_hub(tmp_path).read_text().splitlines()]
    rows = [
        {"doc_id": i, "target": doc["ground_truth"], "filtered_resps": "B", "vsibench_score": doc}
        for i, doc in enumerate(docs)
    ]
    given = tools.write_samples(tmp_path / "1_samples_vsibench.jsonl", rows[::-1])
    alone, _ = scored(tmp_path / "alone", given)
    found, _ = scored(tmp_path / "out", given, f"--data={tmp_path / 'vsi_bench.json'}")
    assert sorted(alone, key=lambda p: p.id) == found and [p.target for p in found] == ["4", "B"]


def test_questions_are_found_by_the_ids_that_samples_log(scored: Callable, tmp_path: Path):
    """3DSRBench's first configuration has the plain questions alone, in an order of its own."""
    data = files.write_3dsrbench(tmp_path)
    rows = [
        {
            **tools.sample(n),
            "input": f"What is {10 * q}?",
            "target": "A",
            "acc": {"index": f"ABCDEF0{q}"},
        }
        for n, q in enumerate((1, 0))
    ]
    given = tools.write_samples(tmp_path / "1_samples_3dsrbench.jsonl", rows)
    found, _ = scored(tmp_path / "out", given, f"--data={data}", "--allow-missing")
    assert [p.id for p in found] == ["0", "10"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input": "What is 7?"},
            "line 2 of .*jsonl asks 'What is 7.', .* question 1 is 'What is 1",
        ),
        ({"target": "(A)"}, "line 2 of .* right answer '.A.', and question 1 .* right answer 'B':"),
        ({"resps": [["-1.5", "False"], ["-2.5", "True"]]}, "has no answer in words in 'resps'"),
        ({"resps": ["A", "B"]}, "line 2 of .* has 2 samples and the first 1"),
        ({"doc_id": "x"}, 'line 2 of .*doc_id is "x", expected a whole number'),
    ],
)
def test_samples_of_other_questions_are_refused(
    score: Callable, change: dict, message: str, tmp_path: Path
):
    rows = [tools.sample(0), tools.sample(1, **change), tools.sample(2), tools.sample(3)]
    given = tools.write_samples(tmp_path / "1_samples_blink.jsonl", rows)
    code, out, err = score("--score", given, f"--data={tools.write_blink(tmp_path)}")
    assert (code, out) == (2, "") and err.count("\n") == 1 and re.search(message, err), err


LATEX = "Handwritten Mathematical Expression Recognition"
FORMULA = str(["x \\frac 1 2"])  # in Python's words, with two backslashes


@pytest.mark.parametrize(
    ("name", "answer", "kind", "target", "other"),
    [
        ("ocrbench", FORMULA, LATEX, FORMULA, "['x']"),
        ("spatial457", "Yes", "L4_pose", "True", "False"),
        ("hallusionbench", "No", "VS", "The figure says so.", "Yes, it is."),
    ],
)
def test_right_answers_are_compared_as_lmms_eval_spells_them(
    score: Callable, name: str, answer: str, kind: str, target: str, other: str, tmp_path: Path
):
    row = {"index": "VS_a_1_0_1_0", "question": "What?", "answer": answer, "category": kind}
    data = files.write_tsv(tmp_path / "x.tsv", [{**row, "l2-category": "a"}])
    line = {"doc_id": 0, "input": "What?", "target": target, "filtered_resps": "no"}
    path = tmp_path / f"1_samples_{name}.jsonl"
    assert score("--score", tools.write_samples(path, [line]), f"--data={data}")[0] == 0
    assert (
        score("--score", tools.write_samples(path, [{**line, "target": other}]), f"--data={data}")[
            0
        ]
        == 2
    )


def test_samples_without_questions_need_the_question_file(score: Callable, tmp_path: Path):
    given = tools.write_samples(tmp_path / "1_samples_blink.jsonl", [tools.sample(0)])
    code, _, err = score("--score", given)
    assert code == 2 and "without their questions: give the question file of BLINK as --data" in err
