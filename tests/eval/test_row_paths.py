"""Paths in question files stay inside the folder that the user named, unless others are allowed."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spatial_ssrl_jax import evaluate, preview
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.sources import Reading, open_source
from spatial_ssrl_jax.data.sources.row_paths import is_inside
from spatial_ssrl_jax.eval.benchmarks.registry import Benchmark, open_benchmark
from spatial_ssrl_jax.tasks.flip import QUESTION
from tests.helpers import benchmark_files as files
from tests.helpers.images import photo

ALLOWED = Reading(allow_outside_paths=True)
HINT = r"--allow-outside-paths; for a run --config\.data\.allow_outside_paths=true"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder `named` with a folder of question files in it, and a private image beside it."""
    for folder in ("named/sub", "named/images", "private"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("named/sub/a.png", "named/images/b.png", "private/c.png", "named/d.png"):
        Image.fromarray(photo(1, 60, 60)).save(tmp_path / name)
    (tmp_path / "named/sub/link.png").symlink_to(tmp_path / "private/c.png")
    (tmp_path / "named/sub/linked").symlink_to(tmp_path / "private")
    return tmp_path


# Paths of an image in a row of a file in `named/sub`; PLACE is what the fixture gives.
GOOD = (
    "a.png",
    "./a.png",
    "../images/b.png",
    "../sub/../images/b.png",
    "PLACE/named/images/b.png",
    "PLACE/named/sub/../images/b.png",
    "link.png",  # as the Hub's cache has it
    "linked/c.png",
)
BAD = (
    "../../private/c.png",
    "../images/../../private/c.png",
    "PLACE/private/c.png",
    "PLACE/named/../private/c.png",
    "/../PLACE/private/c.png",
    "PLACE/named-other/c.png",
    "../../private/gone.png",  # nor does the message tell whether there is a file
)


def test_inside_is_by_words_alone():
    for path, folder, inside in (
        ("/a/b", "/a", True),
        ("/a", "/a", True),
        ("/ab", "/a", False),
        ("/a/../b", "/a", False),
        ("/a/b/../../a/c", "/a", True),
        ("x/../../y", ".", False),
        ("x/../y", ".", True),
        ("//a/b", "/a", True),
        ("/etc/passwd", "/", True),
    ):
        assert is_inside(path, folder) == inside, (path, folder)


# ------------------------------------------------------------------------- ready-made questions


def write_questions(place: Path, kind: str, image: str) -> Path:
    """A question whose image has a path, in one of the formats."""
    image = image.replace("PLACE", str(place))
    if kind == "json":
        row = {"instruction": QUESTION, "output": "\\boxed{2-0}", "images": [image]}
        return files.write_json(place / "named/sub/sft.json", [row])
    cell = image if kind == "text" else {"bytes": None, "path": image}
    schema = None
    if kind == "struct":
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        fields = [("problem", pa.string()), ("answer", pa.string()), ("images", pa.list_(struct))]
        schema = pa.schema(fields)
    rows = [{"problem": QUESTION, "answer": "2-0", "images": [cell]}]
    pq.write_table(pa.Table.from_pylist(rows, schema), place / "named/sub/train.parquet")
    return place / "named/sub/train.parquet"


@pytest.mark.parametrize("kind", ["json", "text", "struct"])
@pytest.mark.parametrize("image", GOOD)
def test_questions_of_images_inside(place: Path, kind: str, image: str):
    write_questions(place, kind, image)
    source = open_source(f"ssrl81k:{place / 'named'}")
    assert source[0].images[0].shape == (60, 60, 3) and source.sizes(0) == [(60, 60)]


@pytest.mark.parametrize("kind", ["json", "text", "struct"])
@pytest.mark.parametrize("image", BAD)
def test_questions_of_images_outside_are_refused(place: Path, kind: str, image: str):
    file = write_questions(place, kind, image)
    spec, written = f"ssrl81k:{place / 'named'}", image.replace("PLACE", str(place))
    for read in (
        lambda: open_source(spec)[0],
        lambda: open_source(spec).sizes(0),
    ):
        with pytest.raises(UserError, match=HINT) as caught:
            read()
        assert str(caught.value).startswith(f"question 0 of {file}: its image '{written}' is out")
    if "c.png" in image and "other" not in image:
        source = open_source(spec, ALLOWED)
        assert source[0].images[0].shape == (60, 60, 3)
        assert str(place / "private") in source.inputs


def test_a_link_does_not_turn_what_is_above_it(place: Path):
    """`linked/..` is the folder of the link, and not that of what it points to."""
    (place / "named/e.png").symlink_to(place / "named/d.png")
    Image.fromarray(photo(2, 40, 40)).save(place / "e.png")
    (place / "named/sub/up").symlink_to(place / "private")
    write_questions(place, "json", "up/../../e.png")
    assert open_source(f"ssrl81k:{place / 'named'}")[0].images[0].shape == (60, 60, 3)


def test_the_folder_of_a_file_is_what_is_named_with_it(place: Path):
    file = write_questions(place, "json", "../images/b.png")
    with pytest.raises(UserError, match="name a folder that holds both"):
        open_source(f"ssrl81k:{file}")
    assert len(open_source(f"ssrl81k:{file}", ALLOWED)) == 1


def test_a_name_beside_bytes_is_no_path(place: Path):
    """Released files keep the path that an image once had: it is read by nobody."""
    file, outside = place / "named/train.parquet", str(place / "private/c.png")
    cell = {"bytes": files.png(3), "path": outside}
    rows = [{"problem": QUESTION, "answer": "2-0", "images": [cell]}]
    pq.write_table(pa.Table.from_pylist(rows), file)
    source = open_source(f"ssrl81k:{file}")
    assert source[0].images[0].shape == (30, 40, 3) and source.origin(0) == outside
    assert source.inputs == (str(place / "named"),)
    before = source.fingerprint()
    (place / "private/c.png").write_bytes(b"other")
    assert source.fingerprint() == before


def test_preview_publishes_nothing_from_outside(run: Callable, place: Path, tmp_path: Path):
    write_questions(place, "struct", "../../private/c.png")
    argv = [f"--source=ssrl81k:{place / 'named'}", f"--out={tmp_path / 'out'}", "--count=1"]
    code, out, err = run(preview.main, *argv)
    assert (code, out) == (2, "") and "its image '../../private/c.png' is outside of" in err
    assert "--allow-outside-paths" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert run(preview.main, *argv, "--allow-outside-paths")[0] == 0
    assert len(list((tmp_path / "out/images").iterdir())) == 1


# -------------------------------------------------------------------------------- benchmarks


def write_benchmark(place: Path, kind: str, image: str) -> Path:
    """A benchmark of two questions, the second of an image of that path."""
    image = image.replace("PLACE", str(place))
    rows = [files.mcq_row(i, image_path=path) for i, path in enumerate(("a.png", image))]
    rows = [{key: value for key, value in row.items() if key != "image"} for row in rows]
    folder = place / "named/sub"
    if kind == "tsv":
        return files.write_tsv(folder / "BLINK.tsv", rows)
    if kind == "jsonl":
        (folder / "BLINK.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "BLINK.jsonl"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "BLINK.parquet")
        return folder / "BLINK.parquet"
    return files.write_json(folder / "BLINK.json", rows)


def opened(place: Path, **allow: bool) -> Benchmark:
    """BLINK from the folder `named`, in which its file has its published name."""
    return open_benchmark("blink", place / "named", **allow)


@pytest.mark.parametrize("image", [*GOOD, "d.png", "images/b.png", "sub/a.png"])
def test_images_of_benchmarks_inside(place: Path, image: str):
    write_benchmark(place, "tsv", image)
    for question in opened(place).questions:
        assert question.images[0].open().shape == (60, 60, 3)


@pytest.mark.parametrize("image", BAD)
def test_images_of_benchmarks_outside_are_refused(place: Path, image: str):
    write_benchmark(place, "tsv", image)
    written = image.replace("PLACE", str(place))
    with pytest.raises(UserError, match=HINT) as caught:
        opened(place)
    assert str(caught.value).startswith(f"row 2 of BLINK.tsv: its file '{written}' is outside of")
    found = opened(place, allow_missing=True)
    assert len(found.questions) == 1 and f"'{written}' is outside" in found.left_out[0]
    if "c.png" in image and "other" not in image:
        questions = opened(place, allow_outside_paths=True).questions
        assert questions[1].images[0].open().shape == (60, 60, 3)


def test_a_file_that_is_named_alone(place: Path):
    """Its folder is what is named; what is above it needs the flag."""
    for image in ("../images/b.png", "PLACE/named/images/b.png"):
        path = write_benchmark(place, "tsv", image)
        with pytest.raises(UserError, match="row 2 of BLINK.tsv: .* name a folder that holds both"):
            open_benchmark("blink", path)
    path = write_benchmark(place, "tsv", "images/b.png")  # beside its folder
    with pytest.raises(UserError, match="row 2 of BLINK.tsv: .* is outside of"):
        open_benchmark("blink", path)
    allowed = open_benchmark("blink", path, allow_outside_paths=True)
    assert allowed.questions[1].images[0].open().shape == (60, 60, 3)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_every_format_of_a_question_file(place: Path, kind: str):
    path = write_benchmark(place, kind, "PLACE/private/c.png")
    with pytest.raises(UserError, match=f"row 2 of {path.name}: its file .* is outside"):
        open_benchmark("blink", path)
    assert len(open_benchmark("blink", path, allow_outside_paths=True).questions) == 2


def test_a_video_outside_is_refused(place: Path):
    files.write_vsi(place / "named")
    rows = json.loads((place / "named/vsi_bench.json").read_text())
    (place / "private/1.mp4").write_bytes(b"clip")
    path = files.write_json(
        place / "named/vsi_bench.json", [rows[0], rows[1] | {"mp4_path": "../private/1.mp4"}]
    )
    with pytest.raises(UserError, match="row 2 of vsi_bench.json: its file '../private/1.mp4' is"):
        open_benchmark("vsi_bench", path)


@pytest.mark.parametrize("value", [5, [5], {"a": 1}, "loop.png", "sub", "x\0y.png", "nul\0"])
def test_what_is_no_path_of_a_file_is_missing(place: Path, value):
    """A number, a loop of links, a folder, a name that no file can have."""
    (place / "named/sub/loop.png").symlink_to("loop.png")
    rows = [files.mcq_row(0, image_path=value)]
    path = files.write_json(place / "named/sub/BLINK.json", rows)
    with pytest.raises(UserError, match="row 1 of BLINK.json: there is no"):
        open_benchmark("blink", path)


def test_pages_show_nothing_from_outside(run: Callable, place: Path, tmp_path: Path):
    """With stored answers too: their pages show the images of --data."""
    run = partial(run, evaluate.main)
    write_benchmark(place, "tsv", "../../private/c.png")
    line = {"benchmark": "blink", "category": "thing", "question": "?", "target": "A"}
    lines = [line | {"id": str(i), "response": "A"} for i in range(2)]
    given = tmp_path / "predictions.jsonl"
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = [f"--score={given}", f"--out={tmp_path / 'out'}", f"--data={place / 'named'}"]
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and "row 2 of BLINK.tsv: its file '../../private/c.png'" in err
    assert err.count("\n") == 1 and not (tmp_path / "out").exists()
    code, _, _ = run(*argv, "--allow-missing")
    assert code == 0 and (tmp_path / "out/results.html").read_text().count("<img") == 1
    code, _, _ = run(*argv, "--allow-outside-paths", "--overwrite")
    assert code == 0 and (tmp_path / "out/results.html").read_text().count("<img") == 2
    compared = ["--compare", given, given, f"--data={place / 'named'}", f"--out={tmp_path / 'c'}"]
    assert run(*compared)[0] == 2 and run(*compared, "--allow-outside-paths")[0] == 0


def test_a_transparent_image_of_a_benchmark_is_put_on_white(place: Path):
    Image.new("RGBA", (30, 20)).save(place / "named/sub/clear.png")
    write_benchmark(place, "tsv", "clear.png")
    assert (opened(place).questions[1].images[0].open() == 255).all()
