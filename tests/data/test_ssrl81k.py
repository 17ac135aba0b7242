"""Ready-made questions in the formats of the released data, and the sets that preview writes."""

import io
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spatial_ssrl_jax import preview
from spatial_ssrl_jax.common import retry
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.data.sources.mixture import source_notes
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


def write_json(folder: Path) -> Path:
    output = "<think>The sky is above.</think> \\boxed{0-2-1}"
    row = {
        "instruction": f"<image>{SHUFFLE['1x3']} {FORMAT_PROMPT}",
        "input": "",
        "output": output,
        "images": [as_cell("path", folder, 7)],
    }
    (folder / "sft.json").write_text(json.dumps([row]))
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
    file = write_parquet(tmp_path, "bytes")
    table = pq.read_table(file).to_pylist()
    table[0]["images"] = [b"no image"]
    pq.write_table(pa.Table.from_pylist(table), file)
    with pytest.raises(BadImage, match=r"train\.parquet#0"):
        open_source(f"ssrl81k:{file}")[0]


# ----------------------------------------------------------------------- where images are


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where anything is waited for."""
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))


def write_released(top: Path, file: str, paths: list[str], folder: str) -> None:
    """Questions of `paths` in a file below `top`, and their images in `folder` by number."""
    for number in range(len(paths)):
        image = top / folder / "flip" / f"image_{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(encoded(number))
    (top / file).parent.mkdir(parents=True, exist_ok=True)
    if file.endswith(".json"):
        rows = [{"instruction": FLIP, "output": "\\boxed{3-0}", "images": [p]} for p in paths]
        (top / file).write_text(json.dumps(rows))
    else:
        rows = [{"problem": FLIP, "answer": "3-0", "images": [path]} for path in paths]
        pq.write_table(pa.Table.from_pylist(rows), top / file)


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("spatialssrl.parquet", "images"),  # as on the Hub
        ("data/parquets/train.parquet", "data/images"),  # as the authors train
        ("data/parquets/v1/train.parquet", "data/images"),
        ("data/SFT-coldstart.json", "data/coldstart_SFT_images"),
    ],
)
@pytest.mark.parametrize(
    "prefix", ["{name}/", "./{name}/", "data/{name}/", "/mnt/images/their/data/{name}/", ""]
)
def test_released_images_are_found_where_the_authors_put_them(
    tmp_path: Path, impatient, file: str, folder: str, prefix: str
):
    name = Path(folder).name
    if not prefix and name != "images":
        pytest.skip("paths without a folder are those of images/")
    paths = [f"{prefix.format(name=name)}flip/image_{number}.png" for number in range(3)]
    write_released(tmp_path, file, paths, folder)
    for named in (file, Path(file).parent, "."):
        source = open_source(f"ssrl81k:{tmp_path / named}")
        source = pickle.loads(pickle.dumps(source))
        for number in range(3):
            assert source.sizes(number) == [(30, 40)]
            with Image.open(io.BytesIO(encoded(number))) as expected:
                np.testing.assert_array_equal(source[number].images[0], np.asarray(expected))
        assert str(tmp_path / folder / "flip") in map(os.path.normpath, source.inputs)
        before = source.fingerprint()
        assert open_source(f"ssrl81k:{tmp_path / named}").fingerprint() == before
    (tmp_path / folder / "flip/image_0.png").write_bytes(encoded(9))
    assert open_source(f"ssrl81k:{tmp_path}").fingerprint() != before


@pytest.mark.parametrize(
    ("file", "path", "folder"),
    [
        ("a/b/c/d/train.parquet", "images/flip/image_0.png", "a/images"),  # three folders above
        ("a/b/train.parquet", "photos/flip/image_0.png", "a/photos"),  # of no released name
        ("a/b/train.parquet", "../images/flip/image_0.png", "a/images"),  # it leaves its folder
        ("a/b/train.parquet", "images/../images/flip/image_0.png", "a/images"),
    ],
)
def test_other_folders_are_not_looked_in(
    tmp_path: Path, impatient, file: str, path: str, folder: str
):
    write_released(tmp_path, file, [path], folder)
    message = "is outside of" if path.startswith("..") else "none of its images is there"
    with pytest.raises(UserError, match=message):
        open_source(f"ssrl81k:{tmp_path / file}")


def test_beside_images_of_a_folder_above_nothing_else_there_is_read(tmp_path: Path):
    paths = ["images/flip/image_0.png", "../private.png", f"{tmp_path}/data/private.png"]
    write_released(tmp_path, "data/parquets/train.parquet", paths, "data/images")
    (tmp_path / "data/private.png").write_bytes(encoded(1))
    source = open_source(f"ssrl81k:{tmp_path / 'data/parquets'}")
    assert source[0].images[0].shape == (30, 40, 3)
    with pytest.raises(BadImage, match=r"its image '\.\./private\.png' is outside of"):
        source[1]
    with pytest.raises(BadImage, match=r"images/.*/private\.png: there is no such file"):
        source[2]  # the path is looked for in the images' folder alone


@pytest.mark.parametrize("file", ["train.parquet", "sft.json"])
def test_images_that_are_not_there_are_said_at_once(tmp_path: Path, impatient, file: str):
    write_released(tmp_path, file, [f"images/flip/image_{n}.png" for n in range(4)], "images")
    (tmp_path / "images").rename(tmp_path / "zip")
    message = rf"{file}: none of its images is there, .*{tmp_path}/images/flip/image_0\.png: unpack"
    with pytest.raises(UserError, match=message) as error:
        open_source(f"ssrl81k:{tmp_path}")
    assert not isinstance(error.value, BadImage)
    (tmp_path / "images/flip").mkdir(parents=True)
    (tmp_path / "zip/flip/image_3.png").rename(tmp_path / "images/flip/image_3.png")
    source = open_source(f"ssrl81k:{tmp_path}")
    assert source[3].images[0].shape == (30, 40, 3)
    for read in (source.sizes, source.__getitem__):
        with pytest.raises(BadImage, match=r"image_1\.png: there is no such file"):
            read(1)


def test_a_folder_of_images_that_is_missing_is_not_waited_for(tmp_path: Path, impatient):
    paths = ["images/flip/image_0.png", "images/crop/image_0.png"]
    write_released(tmp_path, "train.parquet", paths, "images")
    with pytest.raises(BadImage, match=r"crop/image_0\.png: there is no such file"):
        open_source(f"ssrl81k:{tmp_path}")[1]


def test_images_that_were_there_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_released(tmp_path, "train.parquet", ["images/flip/image_0.png"], "images")
    source, away = open_source(f"ssrl81k:{tmp_path}"), tmp_path / "away"
    (tmp_path / "images").rename(away)
    monkeypatch.setattr(retry.time, "sleep", lambda _: away.rename(tmp_path / "images"))
    assert source[0].images[0].shape == (30, 40, 3)
    (tmp_path / "images").rename(away)
    assert source.sizes(0) == [(30, 40)]


# ----------------------------------------------------------------------- rows that are no question


BAD_ROWS = {
    "null answer": ({"answer": None}, "its answer is null, expected text"),
    "empty answer": ({"answer": " "}, 'its answer is " ", expected text'),
    "null question": ({"problem": None}, "its problem is null, expected text"),
    "empty question": ({"problem": ""}, 'its problem is "", expected text'),
    "another task": ({"problem": "What is it?"}, "is of none of the tasks shuffle, flip, crop"),
}
BAD_JSON_ROWS = {
    "no box": ({"output": "no box"}, "has no .boxed answer"),
    "empty box": ({"output": "\\boxed{ }"}, "has no .boxed answer"),
    "null answer": ({"output": None}, "lacks the key 'output'"),
    "null question": ({"instruction": None}, "lacks the key 'instruction'"),
    "another task": ({"instruction": "What is it?"}, "is of none of the tasks shuffle, flip"),
    "no image": ({"images": []}, r"images is \[\], expected at least one path"),
    "empty image": ({"images": [""]}, r'images is \[""\], expected at least one path'),
    "no path": ({"images": [3]}, r"images is \[3\], expected text"),
    "no row": (None, "holds no JSON object"),
}


def change_row(file: Path, number: int, changes: dict | None) -> None:
    """Changes one row of a file; None replaces it by a text."""
    if file.suffix == ".json":
        rows = json.loads(file.read_text())
        rows[number] = "text" if changes is None else rows[number] | changes
        file.write_text(json.dumps(rows))
    else:
        table = pq.read_table(file)
        rows = table.to_pylist()
        rows[number] |= changes
        pq.write_table(pa.Table.from_pylist(rows, table.schema), file)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        *(("train.parquet", *case) for case in BAD_ROWS.values()),
        *(("sft.json", *case) for case in BAD_JSON_ROWS.values()),
    ],
    ids=[*BAD_ROWS, *(f"JSON {name}" for name in BAD_JSON_ROWS)],
)
def test_a_row_that_is_no_question_is_left_out_and_named(
    tmp_path: Path, file: str, changes: dict | None, message: str
):
    write_released(tmp_path, file, [f"images/flip/image_{n}.png" for n in range(4)], "images")
    change_row(tmp_path / file, 2, changes)
    source = open_source(f"ssrl81k:{tmp_path}")
    assert [source.name(i) for i in range(len(source))] == [f"{file}#{n}" for n in (0, 1, 3)]
    (note,) = source_notes(source)
    assert re.search(rf"1 of 4 questions left out: question 2 of .*/{file}:? .*{message}", note)


def test_of_many_bad_rows_some_are_named_and_all_counted(tmp_path: Path):
    write_released(
        tmp_path, "a.parquet", [f"images/flip/image_{n}.png" for n in range(9)], "images"
    )
    for number in range(8):
        change_row(tmp_path / "a.parquet", number, {"answer": None})
    (note,) = open_source(f"ssrl81k:{tmp_path}").notes
    assert note.startswith("8 of 9 questions left out: question 0 of ")
    assert note.count("its answer is null") == 5 and note.endswith("(and 3 more)")
    change_row(tmp_path / "a.parquet", 8, {"answer": None})
    message = r"found no question \(9 rows are none: question 0 .* its answer is null"
    with pytest.raises(UserError, match=message):
        open_source(f"ssrl81k:{tmp_path}")


@pytest.mark.parametrize("count", [0, 1, 4, 6])
@pytest.mark.parametrize("form", ["train.parquet", "sft.json"])
def test_a_row_with_too_few_images_is_a_bad_image(tmp_path: Path, form: str, count: int):
    write_released(tmp_path, form, [f"images/flip/image_{n}.png" for n in range(6)], "images")
    images = [f"images/flip/image_{n}.png" for n in range(count)]
    key = "instruction" if form == "sft.json" else "problem"
    change_row(tmp_path / form, 1, {key: CROP, "images": images})
    source = open_source(f"ssrl81k:{tmp_path}")
    if form == "sft.json" and not count:
        assert len(source) == 5
        return
    said = f"placeholders for 5 images .* but {count} were given" if count else "has no image"
    for read in (source.sizes, source.__getitem__):
        with pytest.raises(BadImage, match=rf"^{form}#1: .*{said}"):
            read(1)


def test_copies_in_another_file_are_left_out(tmp_path: Path):
    """The authors' validation set is made of the first rows of the training set."""
    paths = [f"images/flip/image_{n}.png" for n in (0, 1, 2, 2)]
    write_released(tmp_path, "parquets/train.parquet", paths, "images")
    write_released(tmp_path, "parquets/test.parquet", [*paths[:2], paths[0]], "images")
    change_row(tmp_path / "parquets/test.parquet", 2, {"answer": "1-1"})
    source = open_source(f"ssrl81k:{tmp_path}")
    names = [source.name(i) for i in range(len(source))]
    assert names == [f"parquets/test.parquet#{n}" for n in (0, 1, 2)] + [
        f"parquets/train.parquet#{n}" for n in (2, 3)
    ]
    (note,) = source.notes
    assert re.search("copies of questions left out: 2, for example question 0 of .*train", note)


def test_questions_without_an_images_name_are_no_copies(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name, "bytes")
    source = open_source(f"ssrl81k:{tmp_path}")
    assert len(source) == 10 and not source.notes


def test_damaged_and_missing_files_are_named(tmp_path: Path):
    for content, message in (
        ("no json", r"x\.json is not valid JSON"),
        ("{}", r"x\.json holds no list of questions"),
        ("[]", "found no question; expected parquet"),
        ("[{}]", r"found no question .*question 0 of .*x\.json lacks the key 'instruction'"),
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


def test_a_list_of_data_sets_is_no_file_of_questions(tmp_path: Path):
    write_json(tmp_path)
    (tmp_path / "dataset_info.json").write_text('{"coldstart": {"file_name": "sft.json"}}')
    assert len(open_source(f"ssrl81k:{tmp_path}")) == 1


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
