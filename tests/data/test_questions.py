"""Questions of one's own: the forms of rows and files, and what becomes of rows that are none."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spatial_ssrl_jax.checkpoint.models import TINY, open_model
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.common.reading import QuestionFields, Reading
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.sources.question_source import QuestionSource
from spatial_ssrl_jax.data.task_sources import task_sources, tasks_for, trained_tasks
from spatial_ssrl_jax.eval.heldout_items import open_pretext
from spatial_ssrl_jax.tasks import questions


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((30, 40, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def written(folder: Path, *rows: Any, name: str = "rows.json") -> QuestionSource:
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    return opened(folder / name)


def opened(path: Path | str, **fields: str) -> QuestionSource:
    source = open_source(f"questions:{path}", Reading(fields=QuestionFields(**fields)))
    assert isinstance(source, QuestionSource)
    return source


RESPONSE = "<think>far</think>\\boxed{B}"
FORMS = [
    {"problem": "<image>Where?", "answer": "B", "images": ["a.png"]},
    {"question": "<image>Where?", "ground_truth": "B", "image": "a.png"},
    {"prompt": "<image>Where?", "solution": "B", "image": {"path": "a.png"}},
    {"problem": "<image>Where?", "answer": "B", "images": "a.png", "task": "rooms"},
    {
        "prompt": [{"role": "user", "content": "<image>Where?"}],
        "reward_model": {"style": "rule", "ground_truth": "B"},
        "images": ["a.png"],
        "data_source": "me/rooms-1",
    },
    {"instruction": "<image>Where?", "input": "", "output": RESPONSE, "images": ["a.png"]},
    {
        "instruction": "<image>Where?",
        "input": "",
        "output": "<think>x</think> B ",
        "image": "a.png",
    },
    {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>Where?"},
            {"from": "gpt", "value": RESPONSE},
        ],
    },
    {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": "<image>Where?"},
            {"role": "assistant", "content": RESPONSE},
        ],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "a.png"},
                    {"type": "text", "text": "Where?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": RESPONSE}]},
        ],
    },
]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("row", FORMS)
def test_the_forms_of_rows(folder: Path, row: dict, name: str):
    source = written(folder, row, name=name)
    example = source[0]
    assert (example.task, example.question, example.answer) == ("questions", "<image>Where?", "B")
    assert [image.shape for image in example.images] == [(30, 40, 3)]
    assert source.sizes(0) == [(30, 40)] and source.origin(0) == "a.png"
    has_response = not {"answer", "ground_truth", "solution", "reward_model"} & row.keys()
    assert bool(example.response) == has_response
    expected = {"rooms": "rooms", "me/rooms-1": "me_rooms_1"}
    assert example.kind == expected.get(row.get("task", row.get("data_source", "")), "")


def test_several_images_and_none(folder: Path):
    source = written(
        folder,
        {"problem": "<image> or <image>?", "answer": 2, "images": ["a.png", "b.png"]},
        {"problem": "<image2> or <image1>?", "answer": "B", "images": ["a.png", "b.png"]},
        {"problem": "How many?", "answer": 2.5},
        {"problem": "Both?", "answer": True, "images": ["a.png", "b.png"]},
    )
    assert [len(source[i].images) for i in range(4)] == [2, 2, 0, 2]
    assert [source[i].answer for i in range(4)] == ["2", "B", "2.5", "True"]
    assert source.sizes(2) == []


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"answer": 3.0}, "3"),
        ({"solution": "It is $\\boxed{3}$."}, "3"),
        ({"solution": "<think>3 or 4</think> <answer> 3 </answer>"}, "3"),
        ({"answer": "", "output": "<think>\\boxed{4}</think>3"}, "4"),
        ({"answer": "a</think> b"}, "b"),
    ],
)
def test_an_answer_is_what_its_box_or_tag_holds(folder: Path, given: dict, answer: str):
    assert written(folder, {"problem": "How many?", **given})[0].answer == answer


BAD = [
    ({"answer": "B"}, "its question is empty"),
    ({"problem": None, "answer": "B"}, "its question is empty"),
    ({"problem": "<image>", "answer": "B", "images": ["a.png"]}, "its question is empty"),
    ({"problem": "Where?"}, "it has no answer"),
    ({"problem": "Where?", "answer": None}, "it has no answer"),
    ({"problem": "Where?", "answer": ["B"]}, 'its answer is ["B"]; expected text'),
    ({"problem": "<image>?", "answer": "B"}, "marks for 1 images, but it has 0"),
    ({"problem": "<image>?", "answer": "B", "images": ["a.png", "b.png"]}, "but it has 2"),
    ({"problem": "?", "answer": "B", "images": [None]}, "its image is null; expected a path"),
    ({"problem": "?", "answer": "B", "images": ["data:image/png;base64,AA"]}, "expected the path"),
    ({"problem": "?", "answer": "B", "image": "https://a.b/c.png"}, "expected the path of a file"),
    ({"problem": "?", "answer": float("nan")}, "it has no answer"),
    ({"problem": "<|image_pad|>?", "answer": "B"}, "its question holds <|image_pad|>"),
    ({"problem": "?<|im_end|>", "answer": "B"}, "its question holds <|im_end|>"),
    ({"problem": "<video>?", "answer": "B"}, "it asks about a video"),
    ([1], "it is no object"),
    (
        {"messages": [{"role": "user", "content": "a"}] * 2, "answer": "B"},
        "several exchanges; only one is supported",
    ),
    ({"messages": [{"role": "tool", "content": "a"}], "answer": "B"}, 'the role "tool"'),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}], "answer": "B"}, "has a part"),
]


@pytest.mark.parametrize(("row", "said"), BAD)
def test_a_row_that_is_no_question_is_left_out_and_named(folder: Path, row: Any, said: str):
    source = written(folder, FORMS[0], row, FORMS[0])
    assert len(source) == 2 and source.name(1) == "rows.json#2"
    (note,) = source.notes
    assert note.startswith(f"1 of 3 questions left out: question 1 of {folder / 'rows.json'}: ")
    assert said in note


def test_a_line_that_is_no_json_is_left_out(folder: Path):
    (folder / "x.jsonl").write_text(json.dumps(FORMS[0]) + "\n{\n\n" + json.dumps(FORMS[1]) + "\n")
    source = opened(folder / "x.jsonl")
    assert len(source) == 2 and "question 1 of" in source.notes[0]


def table(rows: list[dict]) -> pa.Table:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.Table.from_pylist(
        rows,
        pa.schema([("images", pa.list_(image)), ("problem", pa.string()), ("answer", pa.string())]),
    )


def test_parquet_and_arrow_and_their_images(tmp_path: Path):
    rows = [
        {"images": [{"bytes": png(i), "path": f"p{i}.png"}], "problem": "Q?", "answer": str(i)}
        for i in (40, 90)
    ] + [{"images": [], "problem": "None?", "answer": "0"}]
    pq.write_table(table(rows), tmp_path / "rows.parquet", row_group_size=1)
    arrow = tmp_path / "saved"
    arrow.mkdir()
    (arrow / "state.json").write_text("{}")
    (arrow / "dataset_info.json").write_text("{}")
    with pa.ipc.new_stream(str(arrow / "data-00000-of-00001.arrow"), table(rows).schema) as sink:
        sink.write_table(table(rows), max_chunksize=2)
    for path, origin in ((tmp_path / "rows.parquet", "p40.png"), (arrow, None)):
        source = opened(path)
        assert [int(source[i].images[0][0, 0, 0]) for i in (0, 1)] == [40, 90]
        assert [source[i].answer for i in range(3)] == ["40", "90", "0"]
        assert source[2].images == () and source.sizes(1) == [(30, 40)]
        assert source.origin(0) == (origin or "data-00000-of-00001.arrow#0")


def test_a_column_with_single_images(tmp_path: Path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"image": {"bytes": png(7), "path": None}, "problem": "<image>?", "answer": "1"}]
    schema = pa.schema([("image", image), ("problem", pa.string()), ("answer", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "x.parquet")
    assert opened(tmp_path / "x.parquet")[0].images[0].shape == (30, 40, 3)


def test_columns_of_other_names(tmp_path: Path):
    rows = [{"pics": [{"bytes": png(), "path": "p.png"}], "ask": "Q?", "label": "3", "of": "t"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    names = {"problem": "ask", "answer": "label", "images": "pics", "task": "of"}
    example = opened(tmp_path / "x.parquet", **names)[0]
    assert (example.question, example.answer, example.kind) == ("Q?", "3", "t")
    assert len(example.images) == 1
    with pytest.raises(UserError, match="has no column none, only pics, ask, label, of; set"):
        opened(tmp_path / "x.parquet", **{**names, "images": "none"})


def test_marks_for_other_images_than_a_tables_row_has_are_bad(tmp_path: Path):
    rows = [
        {"images": [{"bytes": png(), "path": "p"}], "problem": "<image><image>?", "answer": "1"}
    ]
    pq.write_table(table(rows), tmp_path / "x.parquet")
    with pytest.raises(BadImage, match="x.parquet#0: the question has placeholders for 2 images"):
        opened(tmp_path / "x.parquet")[0]


def test_only_files_for_training_are_read_of_a_folder(folder: Path):
    for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"):
        (folder / name).write_text(json.dumps(FORMS[0]) + "\n")
    assert [opened(folder).name(i) for i in range(2)] == ["train-0.jsonl#0", "train-1.jsonl#0"]
    assert len(opened(folder)) == 2 and len(opened(folder / "test-0.jsonl")) == 1


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "PATH is missing"),
        ("{folder}/none.json", "there is no such file or folder; expected parquet"),
        ("mine/train.jsonl", "there is no such file or folder; expected parquet"),
        ("{folder}/a.png", "is no question file; expected parquet"),
        ("{folder}/empty.json", "found no question; expected parquet"),
        ("{folder}/bad.parquet", "cannot be read"),
        ("nobody/nothing", "cannot be downloaded from the Hub"),
    ],
)
def test_what_is_no_source_is_named(folder: Path, path: str, said: str, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: 1 / 0)
    (folder / "empty.json").write_text("[]")
    (folder / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError) as found:
        opened(path.format(folder=folder))
    assert said in str(found.value)


def test_a_hub_id_is_downloaded(folder: Path, monkeypatch):
    (folder / "train.jsonl").write_text(json.dumps(FORMS[0]) + "\n")
    asked = []

    def download(name: str, repo_type: str) -> str:
        asked.append((name, repo_type))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert len(opened("someone/rooms")) == 1 and asked == [("someone/rooms", "dataset")]


def test_they_are_a_task_of_their_own(folder: Path):
    """A question that says "shuffled" is no shuffle question, and pretext tasks need images."""
    row = FORMS[0] | {"problem": "The image was shuffled and flipped. Which?"}
    (folder / "x.json").write_text(json.dumps([row]))
    spec, tasks = f"questions:{folder / 'x.json'}", Config("x").task_settings

    def names(spec: str) -> list[str]:
        return [task.name for task in trained_tasks(tasks_for(open_source(spec), tasks))]

    pretext = ["shuffle", "flip", "crop", "depth", "position"]
    assert names(spec) == ["questions"]
    assert names("scenes:4") == pretext
    assert names(f"{spec}+scenes:4") == [*pretext, "questions"]
    source = open_source(f"{spec}+2*scenes:4")
    found = {t.name: task_sources(source, range(5), t, tasks[t]) for t in tasks}
    assert [s.maker.source.spec for s in found["shuffle"]] == ["scenes:4"]
    assert [s.maker.source.spec for s in found["questions"]] == [spec]
    assert tasks[questions.TASK].weight == 20000


def test_rare_names_have_no_metrics_where_there_are_too_many(folder: Path):
    rows = [{"problem": "3 + 4?", "answer": "7", "task": f"name{i % 66}"} for i in range(130)]
    (folder / "x.json").write_text(json.dumps([*rows, {"problem": "3 + 4?", "answer": "7"}]))
    source = opened(folder / "x.json")
    named = [question.kind for question in source.questions]
    assert len(set(named)) == 65 and named.count("") == 3
    assert "name64" not in named and named.count("name63") == 2
    assert source.notes[0].startswith("2 questions have no metrics by their name")


def test_they_are_questions_of_the_pretext_benchmark_too(folder: Path):
    rows = []
    for number in range(16):
        (folder / f"{number}.png").write_bytes(png())
        task = {"task": "rooms"} if number % 2 else {}
        rows.append(FORMS[0] | {"images": [f"{number}.png"]} | task)
    (folder / "x.json").write_text(json.dumps(rows))
    model = open_model(TINY)
    processor = Processor(model.files, model.config)
    source = opened(folder / "x.json")
    found = open_pretext(source, processor, 16, heldout_fraction=0.5, seed=0).questions
    assert {(q.category, q.target) for q in found} == {("questions", "B"), ("questions/rooms", "B")}
    assert found[0].meta["chance"] is None


def test_every_form_of_the_field_is_read(shared: Path):
    found = shared / "field" / "questions"
    for file in sorted(found.iterdir()):
        if file.is_file():
            source = opened(file)
            assert not source.notes and len(source) in (8, 20)
            assert source[0].images[0].shape == (112, 112, 3) and source[0].answer
