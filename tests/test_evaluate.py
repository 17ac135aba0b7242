"""The command that scores predictions: what it prints and leaves, and what it refuses."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from spatial_ssrl_jax import evaluate
from spatial_ssrl_jax.eval.benchmarks.registry import open_benchmark
from spatial_ssrl_jax.eval.predictions import as_line, read_predictions
from spatial_ssrl_jax.eval.questions import unscored_prediction
from spatial_ssrl_jax.eval.scoring.published import SPATIAL, published_table
from tests.helpers import benchmark_files as files

LINES = [
    {
        "id": i,
        "benchmark": "blink",
        "category": ("Counting", "Jigsaw")[i % 2],
        "question": "Question: What?\nOptions:\nA. chair\nB. table\n",
        "target": "A",
        "response": response,
    }
    for i, response in enumerate(["A", r"\boxed{\text{A. chair}}", "B", "<think>A"])
]


@pytest.fixture
def run(run: Callable) -> Callable:
    """`evaluate` as its `__main__` runs it."""
    return partial(run, evaluate.main)


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_scores_need_six_fields_and_no_model(run, tmp_path: Path):
    given, out = write(tmp_path / "predictions.jsonl", LINES), tmp_path / "out"
    code, printed, _ = run(f"--score={given}", f"--out={out}", "--json")
    scores = json.loads(printed)
    assert code == 0 and scores == json.loads((out / "scores.json").read_text())
    assert {key: scores[key] for key in ("benchmark", "score", "count", "unparsed")} == {
        "benchmark": "blink",
        "score": 50.0,
        "count": 4,
        "unparsed": 1,
    }
    assert scores["categories"] == {
        "Counting": {"score": 50.0, "count": 2},
        "Jigsaw": {"score": 50.0, "count": 2},
    }
    assert 0 <= scores["ci95"][0] < 50 < scores["ci95"][1] <= 100 and scores["extra"] == {}
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(x["extracted"], x["parsed"], x["score"]) for x in lines] == [
        ("A", True, 1.0),
        ("A", True, 1.0),
        ("B", True, 0.0),
        (None, False, 0.0),
    ]
    fields = "id benchmark category question target response meta extracted parsed score"
    assert list(lines[0]) == fields.split() and lines[0]["response"] == "A"


def test_what_was_scored_is_scored_again_to_the_same(run, tmp_path: Path):
    given = write(tmp_path / "a.jsonl", LINES)
    first = run(f"--score={given}", f"--out={tmp_path / 'one'}", "--json")
    again = run(f"--score={tmp_path / 'one' / 'predictions.jsonl'}", "--json")
    assert first == again


def test_the_report_is_beside_the_papers_rows(run, tmp_path: Path):
    code, printed, _ = run(f"--score={write(tmp_path / 'a.jsonl', LINES)}")
    assert code == 0 and "BLINK: 50.00 [" in printed and "4 questions, 1 without" in printed
    assert "Jigsaw" in printed and "Spatial-SSRL-7B: 56.23" in printed


def test_several_benchmarks_make_one_table_in_the_papers_format(run, tmp_path: Path):
    """Missing columns are dashes, and the mean with them; VSI-Bench's column is the paper's own."""
    vsi = {**LINES[0], "benchmark": "vsi_bench", "category": "object_counting", "target": 2}
    given = [
        write(tmp_path / "a.jsonl", LINES),
        write(tmp_path / "b.jsonl", [{**vsi, "response": "3"}]),
    ]
    code, printed, _ = run("--score", *given, f"--out={tmp_path / 'out'}")
    assert code == 0 and "VSI-Bench: 10.00 [" in printed
    ours = [line.split()[2:] for line in printed.splitlines() if line.startswith("this model")]
    assert ours == [["–"] * 6 + ["0.00", "–"], ["–", "50.00", *["–"] * 5]]
    assert printed.count("mean") == 1 and "39.29  56.58\n" in printed and "71.85\n" in printed
    assert (tmp_path / "out/blink/scores.json").exists()
    _, printed, _ = run("--score", *given, "--json")
    assert [x["benchmark"] for x in json.loads(printed)["scores"]] == ["blink", "vsi_bench"]


def test_a_whole_set_has_a_mean():
    titles = dict.fromkeys(SPATIAL, "x")
    assert (
        published_table(dict.fromkeys(SPATIAL, 70.0), titles).splitlines()[-1].split()[-1]
        == "70.00"
    )


def test_vsi_bench_names_the_papers_variant(run, tmp_path: Path):
    line = {**LINES[0], "benchmark": "vsi_bench", "category": "object_counting", "target": 2}
    _, printed, _ = run(f"--score={write(tmp_path / 'a.jsonl', [{**line, 'response': '3'}])}")
    assert "VSI-Bench: 10.00" in printed and "paper: 0.00" in printed
    assert "the paper (compare 'paper' above):" in printed


@pytest.mark.parametrize("name", files.WRITERS)
def test_records_survive_the_file(name: str, tmp_path: Path):
    benchmark = open_benchmark(name, files.WRITERS[name](tmp_path))
    predictions = [
        unscored_prediction(question, benchmark.prompt(question), "A\n\u2028\tü")
        for question in benchmark.questions
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(map(as_line, predictions)), "utf-8")
    assert read_predictions(path) == predictions


def test_mmbench_without_answers_becomes_a_submission(run, tmp_path: Path):
    path = files.write_mmbench(tmp_path, "MMBench_TEST_EN_V11.tsv", answer=False)
    benchmark = open_benchmark("mmbench", path)
    given, out = tmp_path / "predictions.jsonl", tmp_path / "out"
    given.write_text(
        "".join(
            as_line(unscored_prediction(q, benchmark.prompt(q), "B")) for q in benchmark.questions
        )
    )
    code, printed, err = run(f"--score={given}", f"--out={out}")
    assert (code, printed) == (0, "") and "4 answers without a public target, not scored" in err
    rows = [line.split("\t") for line in (out / "submission.tsv").read_text().splitlines()]
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction"]
    assert rows[2] == ["1000241", "What is 1000241?", "chair", "table", "", "", "B"]
    assert not (out / "scores.json").exists()
    code, _, err = run(f"--score={given}")
    assert code == 2 and "give --out=DIR for its submission.tsv" in err


def test_targets_that_are_missing_are_named_or_left_out(run, tmp_path: Path):
    given = write(tmp_path / "a.jsonl", [*LINES, {**LINES[0], "id": 9, "target": None}])
    code, out, err = run(f"--score={given}")
    assert (code, out) == (2, "") and "9 has no target" in err and "--allow-missing" in err
    code, printed, err = run(f"--score={given}", "--allow-missing", "--json")
    assert code == 0 and json.loads(printed)["count"] == 4 and "1 left out" in err


def test_pretext_answers_of_other_tools_are_scored_by_their_category(run, tmp_path: Path):
    row = {"benchmark": "pretext", "question": "?", "target": "2-0-1", "meta": {}}
    rows = [
        row | {"id": "a", "category": "shuffle/1x3", "response": "\\boxed{2-0-1}"},
        row | {"id": "b", "category": "flip", "response": "\\boxed{0}"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, printed, _ = run(f"--score={tmp_path / 'p.jsonl'}", "--json")
    found = json.loads(printed)
    assert code == 0 and found["score"] == 50
    assert (found["extra"]["shuffle"], found["extra"]["flip"]) == (100, 0)


def test_nothing_is_overwritten_unasked(run, tmp_path: Path):
    given, out = write(tmp_path / "predictions.jsonl", LINES), tmp_path / "out"
    assert run(f"--score={given}", f"--out={out}")[0] == 0
    code, _, err = run(f"--score={given}", f"--out={out}")
    assert (
        code == 2 and "predictions.jsonl exists: choose another folder or give --overwrite" in err
    )
    assert run(f"--score={given}", f"--out={out}", "--overwrite")[0] == 0
    code, _, err = run(f"--score={given}", f"--out={tmp_path}", "--overwrite")
    assert code == 2 and "is what is read" in err


def test_a_page_is_beside_the_scores(run, tmp_path: Path):
    given, out = write(tmp_path / "predictions.jsonl", LINES), tmp_path / "out"
    assert run(f"--score={given}", f"--out={out}")[0] == 0
    page = (out / "results.html").read_text()
    assert page.count("<article") == 4 and "<img" not in page
    (out / "scores.json").unlink(), (out / "predictions.jsonl").unlink()
    code, _, err = run(f"--score={given}", f"--out={out}")
    assert code == 2 and "results.html exists" in err
    data = files.WRITERS["blink"](tmp_path)
    code, _, err = run(f"--score={given}", f"--out={out}", f"--data={data}", "--overwrite")
    assert (code, err) == (0, "") and (out / "results.html").read_text().count("<img") == 6
    code, _, err = run(f"--score={given}", f"--data={data}")
    assert code == 2 and "give --out=DIR too" in err
    other = write(tmp_path / "other.jsonl", [{**LINES[0], "id": "x"}])
    code, _, err = run(f"--score={other}", f"--out={tmp_path / 'no'}", f"--data={data}")
    assert code == 2 and "has none of the questions that were answered (the first is x)" in err
    assert not (tmp_path / "no").exists()


def test_two_models_are_compared(run, tmp_path: Path):
    a, b, out = tmp_path / "a" / "blink", tmp_path / "b.jsonl", tmp_path / "out"
    a.mkdir(parents=True)
    write(a / "predictions.jsonl", LINES)
    write(
        b, [*LINES[:1], {**LINES[1], "response": "B"}, *({**x, "response": "A"} for x in LINES[2:])]
    )
    code, printed, _ = run("--compare", a, b, f"--out={out}")
    assert code == 0 and "BLINK, 4 questions answered by both" in printed
    assert "2 gained, 1 lost, 1 both right" in printed and "lost: 1" in printed
    code, as_json, _ = run("--compare", a, b, "--json")
    found = json.loads(as_json)
    assert found == json.loads((out / "comparison.json").read_text())
    assert found["difference"] == 25 and found["flipped"] == {"gained": ["2", "3"], "lost": ["1"]}
    assert found["a"]["unparsed"] == 1 and found["mcnemar_p"] == 1.0
    assert (out / "comparison.html").read_text().count("<article") == 3
    code, _, err = run("--compare", a, b, f"--out={out}")
    assert code == 2 and "comparison.html exists" in err
    write(b, LINES[:3])
    code, _, err = run("--compare", a, b)
    assert code == 2 and "1 question is (3) only in A" in err and err.count("\n") == 1
    code, printed, err = run("--compare", a, b, "--allow-missing", "--json")
    assert code == 0 and json.loads(printed)["count"] == 3 and "only A or B has them: 1" in err
    code, _, err = run("--compare", tmp_path / "a", b)
    assert code == 2 and "one in each of blink below it: give the folder that has it" in err


def test_two_files_of_one_benchmark_are_not_mixed(run, tmp_path: Path):
    given = [write(tmp_path / name, LINES) for name in ("a.jsonl", "b.jsonl")]
    code, out, err = run("--score", *given)
    assert (code, out) == (2, "") and "b.jsonl hold answers to blink: score them one by one" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prediction"),
        ("{", "line 1 of .*a.jsonl is not valid JSON"),
        ("[]", "line 1 of .*a.jsonl holds no JSON object"),
        ('{"id": 1}', "line 1 of .*a.jsonl has no benchmark, category"),
        (json.dumps({**LINES[0], "response": None}), "line 1 .* lacks the key 'response'"),
        (json.dumps({**LINES[0], "meta": 3}), r"line 1 .*meta is 3, expected an object"),
        (json.dumps({**LINES[0], "meta": {"options": {"A": 1}}}), r"meta\.options\.A is 1"),
        (json.dumps({**LINES[0], "meta": {"sample": "a"}}), r'meta\.sample is "a", expected'),
        (json.dumps({**LINES[0], "target": ["A", 1]}), r'target is \["A", 1\], expected text'),
        ("[" * 100_000, "line 1 of .*a.jsonl is not valid JSON"),
        (json.dumps({**LINES[0], "benchmark": "blonk"}), "unknown benchmark 'blonk'"),
        (json.dumps(LINES[0]) + "\n" + json.dumps(LINES[0]), "the id '0' occurs 2 times"),
    ],
)
def test_bad_predictions_are_refused(run, content: str, message: str, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(content)
    code, out, err = run(f"--score={tmp_path / 'a.jsonl'}")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)


def test_the_module_is_a_command(tmp_path: Path):
    given = write(tmp_path / "a.jsonl", LINES)
    command = [sys.executable, "-m", "spatial_ssrl_jax.evaluate", f"--score={given}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["score"] == 50.0
