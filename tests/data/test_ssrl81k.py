"""Ready-made questions in the formats of the released data, and the sets that preview writes."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spatial_ssrl_jax import preview
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.split import split_records
from spatial_ssrl_jax.tasks.protocol import FORMAT_PROMPT
from tests.tasks.test_protocol import CROP, DEPTH, FLIP, POSITION, SHUFFLE

QUESTIONS = {
    "shuffle": (SHUFFLE["1x3"], "0-2-1", 1),
    "flip": (FLIP, "3-0", 1),
    "crop": (CROP, "B", 5),
    "depth": (DEPTH, "2-3-1", 1),
    "position": (POSITION, "D", 1),
}


def encoded(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def as_cell(layout: str, folder: Path, seed: int):
    """An image as one of the forms that `images` holds."""
    if layout == "bytes":
        return encoded(seed)
    (folder / "images").mkdir(exist_ok=True)
    path = f"images/{seed}.png"
    (folder / path).write_bytes(encoded(seed))
    if layout == "path":
        return path
    return {"bytes": encoded(seed) if layout == "struct" else None, "path": path}


def write_parquet(folder: Path, layout: str) -> Path:
    rows, seed = [], 0
    for problem, answer, count in QUESTIONS.values():
        cells = [as_cell(layout, folder, seed + i) for i in range(count)]
        rows.append({"problem": problem, "answer": answer, "images": cells})
        seed += count
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=2)
    return folder / "train.parquet"


@pytest.mark.parametrize("layout", ["bytes", "struct", "struct-path", "path"])
@pytest.mark.parametrize("whole", [False, True])
def test_parquet(tmp_path: Path, layout: str, whole: bool):
    file = write_parquet(tmp_path, layout)
    source = open_source(f"ssrl81k:{tmp_path if whole else file}")
    source = pickle.loads(pickle.dumps(source))
    assert len(source) == 5 and not source.has_depth
    assert len({source.name(i) for i in range(5)}) == 5
    seed = 0
    for index in (0, 1, 2, 3, 4, 0):
        task = list(QUESTIONS)[index]
        question, answer, count = QUESTIONS[task]
        seed = sum(n for _, _, n in list(QUESTIONS.values())[:index])
        example = source[index]
        assert source.task(index) == example.task == task
        assert (example.question, example.answer, example.response) == (question, answer, "")
        assert source.sizes(index) == [(30, 40)] * count
        assert len(example.images) == count and example.source["record"] == source.name(index)
        for i, image in enumerate(example.images):
            with Image.open(io.BytesIO(encoded(seed + i))) as expected:
                np.testing.assert_array_equal(image, np.asarray(expected))


def write_json(folder: Path, **changes) -> Path:
    output = "<think>The sky is above.</think> \\boxed{0-2-1}"
    row = {
        "instruction": f"<image>{SHUFFLE['1x3']} {FORMAT_PROMPT}",
        "input": "",
        "output": output,
        "images": [as_cell("path", folder, 7)],
    }
    (folder / "sft.json").write_text(json.dumps([row | changes]))
    return folder / "sft.json"


def test_sft_json(tmp_path: Path):
    source = open_source(f"ssrl81k:{write_json(tmp_path)}")
    example = source[0]
    assert example.question == f"<image>{SHUFFLE['1x3']}"  # the pipeline appends the format prompt
    assert example.answer == "0-2-1" and example.task == "shuffle"
    assert example.response == "<think>The sky is above.</think> \\boxed{0-2-1}"
    assert example.images[0].shape == (30, 40, 3)
    assert example.source["image"] == str(tmp_path / "images/7.png")


def test_a_parquet_file_with_other_columns_is_named(tmp_path: Path):
    file = tmp_path / "x.parquet"
    for name, missing in (("question", "problem"), ("problem", "images")):
        pq.write_table(pa.table({name: ["?"], "answer": ["1"]}), file)
        with pytest.raises(UserError, match=rf"{file} has no column {missing}, only {name}, ans"):
            open_source(f"ssrl81k:{file}")


def test_a_bad_image_is_named(tmp_path: Path):
    file = write_json(tmp_path, images=["gone.png"])
    with pytest.raises(BadImage, match=r"gone\.png"):
        open_source(f"ssrl81k:{file}")[0]
    file = write_parquet(tmp_path, "bytes")
    table = pq.read_table(file).to_pylist()
    table[0]["images"] = [b"no image"]
    pq.write_table(pa.Table.from_pylist(table), file)
    with pytest.raises(BadImage, match=r"train\.parquet#0"):
        open_source(f"ssrl81k:{file}")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "no box"}, "has no .boxed answer"),
        ({"instruction": "What colour is the sky?"}, "question 0 .* none of the tasks"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        open_source(f"ssrl81k:{write_json(tmp_path, **changes)}")


def test_damaged_and_missing_files_are_named(tmp_path: Path):
    row = {"instruction": SHUFFLE["1x3"], "output": "\\boxed{0}"}
    for content, message in (
        ("no json", r"x\.json is not valid JSON"),
        ("{}", r"x\.json holds no list of questions"),
        ("[{}]", r"question 0 of .*x\.json lacks the key 'instruction'"),
        (json.dumps([row | {"images": []}]), r"images is \[\], expected at least one path"),
        (json.dumps([row | {"images": [3]}]), r"images is \[3\], expected text"),
    ):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match=message):
            open_source(f"ssrl81k:{tmp_path}")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"x\.parquet cannot be read"):
        open_source(f"ssrl81k:{tmp_path}")
    (tmp_path / "empty").mkdir()
    for path, message in (("gone", "no such file"), ("empty", "found no question")):
        with pytest.raises(UserError, match=message):
            open_source(f"ssrl81k:{tmp_path / path}")


@pytest.mark.parametrize("layout", ["json", "struct", "path", "bytes"])
def test_questions_of_one_image_are_held_out_together(tmp_path: Path, layout: str):
    """12 questions of 6 images, twice each; bytes alone do not name the image."""
    file = tmp_path / ("sft.json" if layout == "json" else "train.parquet")
    rows = []
    for number in range(12):
        cell = as_cell("path" if layout == "json" else layout, tmp_path, number % 6)
        if layout == "json":
            texts = {"instruction": FLIP, "output": "<think>.</think>\\boxed{3-0}"}
        else:
            texts = {"problem": FLIP, "answer": "3-0"}
        rows.append(texts | {"images": [cell]})
    if layout == "json":
        file.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    source = open_source(f"ssrl81k:{file}")
    split = split_records(source, 0.34)
    assert sorted(split.train + split.heldout) == list(range(12)) and split.heldout
    shared = {i % 6 for i in split.train} & {i % 6 for i in split.heldout}
    assert bool(shared) == (layout == "bytes")
    assert len({source.origin(i) for i in range(12)}) == (12 if layout == "bytes" else 6)


def test_origins_are_learnt_without_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, columns_read = write_parquet(tmp_path, "struct"), []
    original = pq.ParquetFile.read

    def watched(reader, columns):
        columns_read.extend(columns)
        return original(reader, columns)

    monkeypatch.setattr(pq.ParquetFile, "read", watched)
    source = open_source(f"ssrl81k:{file}")
    assert source.origin(1) == "images/1.png"
    assert columns_read == ["images.list.element.path"]


def test_preview_writes_what_the_source_reads(tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out"
    argv = ["--source=scenes:20:224x224", f"--out={out}", "--count=10", "--parquet"]
    preview.main(argv)
    rows = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    source = open_source(f"ssrl81k:{out / 'examples.parquet'}")
    assert pq.read_schema(out / "examples.parquet").names == ["problem", "answer", "images"]
    assert len(source) == 10
    for index, row in enumerate(rows):
        example = source[index]
        assert source.origin(index) == row["source"]["record"]
        assert (example.task, example.question) == (row["task"], row["question"])
        assert example.answer == row["answer"]
        for image, path in zip(example.images, row["images"], strict=True):
            with Image.open(out / path) as written:
                np.testing.assert_array_equal(image, np.asarray(written))
    # Ready-made questions can be previewed too.
    argv = [f"--source=ssrl81k:{out / 'examples.parquet'}", f"--out={tmp_path / 'again'}"]
    preview.main([*argv, "--count=4", "--tasks=depth,crop", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"] == {"depth": 2, "crop": 2}
