"""Answers of VLMEvalKit and lmms-eval: scored as our own, for the right question or not at all."""

import importlib.util
import json
import random
import re
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from spatial_ssrl_jax import evaluate
from spatial_ssrl_jax.eval.benchmarks import xlsx
from spatial_ssrl_jax.eval.benchmarks.registry import open_benchmark
from spatial_ssrl_jax.eval.predictions import as_line, read_predictions
from spatial_ssrl_jax.eval.questions import Prediction, unscored_prediction
from tests.helpers import benchmark_files as files

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


@pytest.fixture
def score(run: Callable) -> Callable:
    return partial(run, evaluate.main)


def scored(score: Callable, out: Path, *argv) -> tuple[list[Prediction], str]:
    """The predictions that `--score` writes, and what it says."""
    code, _, said = score("--score", *argv, f"--out={out}")
    assert code == 0, said
    return read_predictions(out / "predictions.jsonl"), said


def blink(folder: Path, count: int = 4, kinds: Sequence[str] = ("thing",)) -> Path:
    """Questions of kinds in turn, whose right answers are A, B, A, …; the last marks its image."""
    rows = [
        files.mcq_row(i, "AB"[i % 2], category=kinds[i * len(kinds) // count]) for i in range(count)
    ]
    rows[-1]["question"] = "<image>" + rows[-1]["question"]
    return files.write_tsv(folder / "BLINK.tsv", rows)


def table(folder: Path, change: Callable[[list[dict]], object], name: str = "M_BLINK.tsv") -> Path:
    """VLMEvalKit's answers A to `blink`, with something changed."""
    rows = [{**files.mcq_row(i, "AB"[i % 2]), "prediction": "A"} for i in range(4)]
    rows = [{k: str(v) for k, v in row.items() if k != "image"} for row in rows]
    change(rows)
    return files.write_rows(folder / name, rows)


def samples(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(number: int, **more) -> dict:
    """A line of lmms-eval 0.7 for a question of `blink`."""
    prompt = f"Note: one letter.\nWhat is {number}?\nA. chair\nB. table"
    row = {"doc_id": number, "target": f"({'AB'[number % 2]})", "filtered_resps": "A"}
    return {**row, "input": prompt, "blink_acc": {"id": f"val_{number}"}, **more}


# VLMEvalKit's tables


@pytest.mark.parametrize("name", KIT)
def test_a_table_of_the_kit_is_scored_as_our_own_answers(
    score: Callable, name: str, tmp_path: Path
):
    """By its own questions, and by those of our file, which may have another layout and ids."""
    dataset, write_theirs, write_ours = KIT[name]
    (tmp_path / "theirs").mkdir(), (tmp_path / "ours").mkdir()
    theirs = write_theirs(tmp_path / "theirs")
    answers = ["The answer is A.", "The answer is B."]
    given = files.write_kit_table(tmp_path / f"{MODEL}_{dataset}.tsv", theirs, answers)
    benchmark = open_benchmark(name, write_ours(tmp_path / "ours"))
    found, said = scored(score, tmp_path / "out", given, f"--data={tmp_path / 'ours'}")
    assert f"VLMEvalKit's answers to {len(benchmark.questions)} questions of" in said
    own = [unscored_prediction(q, benchmark.prompt(q), "") for q in benchmark.questions]
    for mine, yours in zip(own, found, strict=True):
        assert (mine.id, mine.category, mine.target) == (yours.id, yours.category, yours.target)
        assert mine.meta == yours.meta and yours.response in answers
    alone, _ = scored(score, tmp_path / "alone", given)
    answered = [sorted((p.question, p.response) for p in each) for each in (alone, found)]
    assert answered[0] == answered[1]


@pytest.mark.parametrize("kind", ["xlsx", "tsv", "json"])
def test_each_format_of_the_kit(score: Callable, kind: str, tmp_path: Path):
    questions = blink(tmp_path)
    answers = [
        r"<think>so" + "\r\n" + r"</think>\boxed{A}",
        "",
        "B\nbecause",
        "Failed to obtain answer via API.",
    ]
    given = files.write_kit_table(tmp_path / f"{MODEL}_BLINK.{kind}", questions, answers)
    found, said = scored(score, tmp_path / "out", given)
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


def test_thoughts_that_the_kit_takes_apart_are_put_back(score: Callable, tmp_path: Path):
    """So that SPLIT_THINK changes no score: an answer that was reasoned needs its box."""
    given = files.write_kit_table(
        tmp_path / "M_BLINK.tsv", blink(tmp_path), ["A"], thinking="perhaps B</think>"
    )
    found, _ = scored(score, tmp_path / "out", given)
    assert {p.response for p in found} == {"<think>perhaps B</think>A"}


@pytest.mark.parametrize("written", ["B_x000D_\nso", "x" * xlsx.LONGEST_CELL])
def test_what_excel_does_to_a_cell(score: Callable, written: str, tmp_path: Path):
    given = files.write_kit_table(tmp_path / "M_BLINK.xlsx", blink(tmp_path), [written])
    found, said = scored(score, tmp_path / "out", given)
    cut = len(written) == xlsx.LONGEST_CELL
    assert ("answers that fill their cell, and may lack their end: 4" in said) == cut
    assert found[0].response == (written if cut else "B\r\nso")


def test_an_option_that_pandas_takes_for_missing_is_in_the_question_file(
    score: Callable, tmp_path: Path
):
    """VLMEvalKit loses an option "None": the right answer has no option left in its table."""
    data = files.write_tsv(
        tmp_path / "BLINK.tsv", [files.mcq_row(0), files.mcq_row(1, "C", C="None")]
    )
    answers = files.write_kit_table(tmp_path / "M_BLINK.tsv", data, ["The answer is C."])
    answers.write_text(answers.read_text().replace("None", ""))
    code, _, said = score("--score", answers)
    assert code == 2 and re.search(
        "row 2 of M_BLINK.tsv: its answer 'C' is none.*as --data.$", said
    )
    found, said = scored(score, tmp_path / "out", answers, f"--data={data}")
    scores = [json.loads(line)["score"] for line in (tmp_path / "out/predictions.jsonl").open()]
    assert scores == [0, 1] and len(found) == 2
    found, said = scored(score, tmp_path / "some", answers, "--allow-missing")
    assert [p.id for p in found] == ["0"] and "rows left out, of no question: 1" in said


# which question an answer is of


def test_rows_are_found_by_their_index_whatever_their_order(score: Callable, tmp_path: Path):
    data = blink(tmp_path)

    def change(rows: list[dict]) -> None:
        for row in rows:
            row["prediction"] = f"Answer of {row['index']}"
        random.Random(0).shuffle(rows)
        rows += [rows[0], {**rows[1], "index": "99"}]

    found, said = scored(score, tmp_path / "out", table(tmp_path, change), f"--data={data}")
    assert [(p.id, p.response) for p in found] == [(str(i), f"Answer of {i}") for i in range(4)]
    assert "rows left out, of no question: 1; rows given twice: 1" in said


def test_rows_are_found_by_the_fields_that_an_id_is_made_of(score: Callable, tmp_path: Path):
    """HallusionBench's rows in another order, numbered, with the six fields in columns."""
    theirs = files.write_hallusion_tsv(tmp_path, index=False)
    lines = theirs.read_text().splitlines(keepends=True)
    theirs.write_text("".join([lines[0], *lines[:0:-1]]))
    given = files.write_kit_table(tmp_path / "M_HallusionBench.tsv", theirs, ["1", "0", "text"])
    data = tmp_path / "HallusionBench.json"
    found, said = scored(score, tmp_path / "out", given, f"--data={data}")
    answered = {p.id[-1]: p.response for p in found}
    assert answered == {"0": "0", "1": "1"} and "rows that are not asked: 1" in said


def test_ids_of_another_kind_leave_the_order_to_tell(score: Callable, tmp_path: Path):
    """The Hub's ids of VSI-Bench have gaps: 0, 1, 3, … of the questions 0, 1, 2, …"""
    given = table(
        tmp_path, lambda rows: [row.update(index=str(i * 3)) for i, row in enumerate(rows)]
    )
    found, _ = scored(score, tmp_path / "out", given, f"--data={blink(tmp_path)}")
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
    given = table(tmp_path, change)
    code, out, err = score("--score", given, f"--data={blink(tmp_path)}")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err), err


def test_missing_answers_are_left_out_when_allowed(score: Callable, tmp_path: Path):
    given = table(tmp_path, lambda rows: rows.pop(1))
    argv = (given, f"--data={blink(tmp_path)}", "--allow-missing")
    found, said = scored(score, tmp_path / "out", *argv)
    assert [p.id for p in found] == ["0", "2", "3"]
    assert "questions left out, without an answer: 1" in said


def test_the_name_of_a_file_tells_its_benchmark_or_an_option_does(score: Callable, tmp_path: Path):
    given = table(tmp_path, lambda rows: None, "answers.tsv")
    code, _, err = score("--score", given)
    assert code == 2 and "does not say of which benchmark it is: give --benchmark=NAME" in err
    code, out, _ = score("--score", given, "--benchmark=realworldqa")
    assert code == 0 and out.startswith("RealWorldQA: ")
    code, _, err = score("--score", given, "--benchmark=blonk")
    assert code == 2 and "--benchmark=blonk is none of spatial457, " in err
    named = table(tmp_path, lambda rows: None, "RealWorldQA-tuned_SEEDBench2_Plus.tsv")
    assert score("--score", named)[1].startswith("SEEDBench2-Plus: ")


def test_mmbench_without_answers_becomes_a_submission(score: Callable, tmp_path: Path):
    data = files.write_mmbench(tmp_path, "MMBench_TEST_EN_V11.tsv", answer=False)
    given = files.write_kit_table(tmp_path / "M_MMBench_TEST_EN_V11.tsv", data, ["B"])
    code, _, said = score("--score", given, f"--out={tmp_path / 'out'}")
    assert code == 0 and "submission.tsv: 4 answers without a public target" in said


# lmms-eval's samples


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
    score: Callable, kept: dict, responses: list[str], tmp_path: Path
):
    given = samples(tmp_path / "1_samples_blink.jsonl", [sample(i, **kept) for i in (1, 0, 3, 2)])
    found, said = scored(score, tmp_path / "out", given, f"--data={blink(tmp_path)}")
    assert [p.response for p in found] == responses * 4
    numbers = [None] if len(responses) == 1 else [1, 2]
    assert [p.meta.get("sample") for p in found] == numbers * 4
    assert [p.id for p in found[:: len(responses)]] == ["0", "1", "2", "3"]
    assert found[0].question == sample(0)["input"] and "lmms-eval's answers to 4 questions" in said


def test_tasks_of_lmms_eval_are_parts_of_a_benchmark(score: Callable, tmp_path: Path):
    """A task numbers its own questions; those of all tasks are one benchmark's."""
    data = blink(tmp_path, 4, ["Art_Style", "Counting"])
    rows = [{**sample(i), "doc_id": i % 2, "filtered_resps": f"It is {i}"} for i in range(4)]
    given = [
        samples(tmp_path / f"1_samples_blink_{task}.jsonl", some)
        for task, some in (("counting", rows[2:]), ("art_style", rows[:2]))
    ]
    found, _ = scored(score, tmp_path / "out", *given, f"--data={data}")
    assert sorted((p.id, p.response) for p in found) == [(str(i), f"It is {i}") for i in range(4)]
    code, _, err = score(
        "--score",
        *given,
        samples(tmp_path / "2_samples_blink_counting.jsonl", rows[2:]),
        f"--data={data}",
    )
    assert code == 2 and "hold answers to blink: score them one by one" in err


def test_samples_that_log_their_questions_need_no_file(score: Callable, tmp_path: Path):
    docs = [json.loads(line) for line in files.write_vsi_hub(tmp_path).read_text().splitlines()]
    rows = [
        {"doc_id": i, "target": doc["ground_truth"], "filtered_resps": "B", "vsibench_score": doc}
        for i, doc in enumerate(docs)
    ]
    given = samples(tmp_path / "1_samples_vsibench.jsonl", rows[::-1])
    alone, _ = scored(score, tmp_path / "alone", given)
    found, _ = scored(score, tmp_path / "out", given, f"--data={tmp_path / 'vsi_bench.json'}")
    assert sorted(alone, key=lambda p: p.id) == found and [p.target for p in found] == ["4", "B"]


def test_questions_are_found_by_the_ids_that_samples_log(score: Callable, tmp_path: Path):
    """3DSRBench's first configuration has the plain questions alone, in an order of its own."""
    data = files.write_3dsrbench(tmp_path)
    rows = [
        {**sample(n), "input": f"What is {10 * q}?", "target": "A", "acc": {"index": f"ABCDEF0{q}"}}
        for n, q in enumerate((1, 0))
    ]
    given = samples(tmp_path / "1_samples_3dsrbench.jsonl", rows)
    found, _ = scored(score, tmp_path / "out", given, f"--data={data}", "--allow-missing")
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
    rows = [sample(0), sample(1, **change), sample(2), sample(3)]
    given = samples(tmp_path / "1_samples_blink.jsonl", rows)
    code, out, err = score("--score", given, f"--data={blink(tmp_path)}")
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
    assert score("--score", samples(path, [line]), f"--data={data}")[0] == 0
    assert score("--score", samples(path, [{**line, "target": other}]), f"--data={data}")[0] == 2


def test_samples_without_questions_need_the_question_file(score: Callable, tmp_path: Path):
    given = samples(tmp_path / "1_samples_blink.jsonl", [sample(0)])
    code, _, err = score("--score", given)
    assert code == 2 and "without their questions: give the question file of BLINK as --data" in err


# comparing, pages


def test_answers_of_two_tools_are_compared_with_our_own(score: Callable, tmp_path: Path):
    data = blink(tmp_path)
    benchmark = open_benchmark("blink", data)
    own = [unscored_prediction(q, benchmark.prompt(q), "B") for q in benchmark.questions]
    ours = tmp_path / "predictions.jsonl"
    ours.write_text("".join(map(as_line, own)))
    lmms = samples(tmp_path / "1_samples_blink.jsonl", [sample(i) for i in range(4)])
    for theirs in (table(tmp_path, lambda rows: rows.reverse()), lmms):
        code, printed, err = score("--compare", ours, theirs, f"--data={data}", "--json")
        found = json.loads(printed)
        assert code == 0 and found["count"] == 4, err
        assert found["flipped"] == {"gained": ["0", "2"], "lost": ["1", "3"]}
    code, _, err = score("--compare", ours, ours, "--benchmark=blink")
    assert code == 2 and "--compare needs no --benchmark" in err


def test_a_page_has_the_images_that_are_there(score: Callable, tmp_path: Path):
    given = table(tmp_path, lambda rows: None)
    data = blink(tmp_path)
    scored(score, tmp_path / "out", given, f"--data={data}")
    assert (tmp_path / "out" / "results.html").read_text().count("<img") == 4
    rows = [files.mcq_row(i, "AB"[i % 2], image="", image_path="gone.png") for i in range(4)]
    files.write_tsv(data, rows)
    _, said = scored(score, tmp_path / "none", given, f"--data={data}")
    assert "the page has no images: row 1 of BLINK.tsv: there is no gone.png" in said
    assert "<img" not in (tmp_path / "none" / "results.html").read_text()


# bad files


def xlsx_of(folder: Path, replace: bytes = b"", by: bytes = b"") -> Path:
    """A table in Excel's format, with something replaced in its sheet."""
    path = table(folder, lambda rows: None, "M_BLINK.xlsx")
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content.replace(replace, by) if replace else content)
    return path


def test_an_xlsx_is_read_whole_whatever_it_says_of_itself(
    score: Callable, recwarn: pytest.WarningsRecorder, tmp_path: Path
):
    for replace, by in (
        (b'<dimension ref="A1:H5"', b'<dimension ref="A1:A2"'),
        (b"cellStyles", b"cellStyleX"),
    ):
        code, out, _ = score("--score", xlsx_of(tmp_path, replace, by))
        assert code == 0 and "of 4" in out and not recwarn.list


def bad(content: bytes, name: str = "M_BLINK.tsv") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def half(folder: Path) -> Path:
    path = xlsx_of(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def folder_of(folder: Path) -> Path:
    (folder / "M_BLINK.tsv").mkdir()
    return folder / "M_BLINK.tsv"


BAD_FILES = {
    "pickle": (bad(b"x", "M_BLINK.pkl"), "is a pickle, which runs code when it is read: give its"),
    "scores": (bad(b"x", "M_BLINK_acc.csv"), "tables of scores, which hold no answers"),
    "missing": (lambda folder: folder / "M_BLINK.tsv", "there is no such file"),
    "empty": (bad(b""), "holds no row: copy or download it again"),
    "not UTF-8": (bad(b"index\tprediction\n\xff\t1\n"), "M_BLINK.tsv cannot be read .Unicode"),
    "empty JSON": (bad(b"[]", "M_BLINK.json"), "holds no row"),
    "half of JSON": (bad(b'[{"index": 1', "M_BLINK.json"), "is not valid JSON"),
    "empty xlsx": (bad(b"", "M_BLINK.xlsx"), "is no Excel table, or only a part of one"),
    "half of xlsx": (half, "is no Excel table, or only a part of one"),
    "damaged xlsx": (partial(xlsx_of, replace=b"<sheetData", by=b"<"), "cannot be read"),
    "rows that are far away": (
        partial(xlsx_of, replace=b'<row r="2"', by=b'<row r="999999999"'),
        "holds no row",
    ),
    "folder": (folder_of, "M_BLINK.tsv is a folder or a pipe, not a file"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_in_a_sentence(score: Callable, kind: str, tmp_path: Path):
    make, message = BAD_FILES[kind]
    code, out, err = score("--score", make(tmp_path), "--benchmark=blink")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err), err


def test_an_xlsx_that_unpacks_to_too_much_is_refused(
    score: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    given = xlsx_of(tmp_path)
    monkeypatch.setattr(xlsx, "_LARGEST", 1000)
    code, _, err = score("--score", given)
    assert code == 2 and re.search("unpacks to .* GiB .*: save the table as TSV.$", err)


def test_without_openpyxl_a_sentence_says_what_to_install(
    score: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = score("--score", bad(b"x", "M_BLINK.xlsx")(tmp_path))
    assert code == 2 and "pip install 'spatial_ssrl_jax[xlsx]', or save the table as TSV" in err
