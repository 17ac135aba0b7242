"""Question files: the real ones whole, small ones of every format, and bad ones refused."""

import json
import pickle
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.eval.benchmarks.registry import SPECS, names_of, open_benchmark
from tests.helpers import benchmark_files as files

COUNTS = {
    "spatial457": 7,
    "3dsrbench": 8,
    "qspatial_plus": 3,
    "whatsup": 6,
    "viewspatial": 2,
    "vsi_bench": 2,
    "mmbench": 4,
    "blink": 3,
    "hallusionbench": 2,
    "ocrbench": 3,
}  # of the small files; 4 where not named


@pytest.fixture(scope="module")
def real(shared: Path) -> Path:
    folder = shared / "benchmarks"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: it holds the real question files.")
    return folder


def linked(real: Path, name: str, folder: Path, media: list[str]) -> Path:
    """A real question file beside one small image under all the names that it asks for."""
    files.write_media(folder, media)
    (folder / name).symlink_to(real / name)
    return folder / name


# the real files


def test_the_real_viewspatial_is_read_whole(real: Path, tmp_path: Path):
    rows = json.loads((real / "ViewSpatial-Bench.json").read_text())
    media = [path for row in rows for path in row["image_path"]]
    found = open_benchmark("viewspatial", linked(real, "ViewSpatial-Bench.json", tmp_path, media))
    assert Counter(q.category for q in found.questions) == {
        "Camera-RelativeDirection": 1773,
        "Camera-ObjectView": 996,
        "Person-ObjectView": 996,
        "Person-RelativeDirection": 842,
        "Person-SceneSimulation": 1105,
    }
    images = [len(q.images) for q in found.questions]
    assert (len(found.questions), min(images), max(images)) == (5712, 1, 32)
    for row, question in zip(rows, found.questions, strict=True):
        assert f"{question.target}. {question.options[question.target]}" == row["answer"]


def test_the_real_vsi_bench_is_read_whole(real: Path, tmp_path: Path):
    rows = json.loads((real / "vsi_bench.json").read_text())
    media = [row["mp4_path"] for row in rows]
    found = open_benchmark("vsi_bench", linked(real, "vsi_bench.json", tmp_path, media)).questions
    assert Counter(q.category for q in found) == {
        "object_size_estimation": 953,
        "object_abs_distance": 834,
        "object_rel_distance": 710,
        "obj_appearance_order": 618,
        "object_counting": 565,
        "object_rel_direction_easy": 217,
        "object_rel_direction_medium": 378,
        "object_rel_direction_hard": 373,
        "room_size_estimation": 288,
        "route_planning": 194,
    }
    assert Counter(bool(q.options) for q in found) == {True: 2490, False: 2640}
    assert len(found) == 5130 and len({q.video for q in found}) == 288


def test_the_real_hallusionbench_is_read_whole(real: Path, tmp_path: Path):
    rows = json.loads((real / "HallusionBench.json").read_text())
    media = [row["filename"] for row in rows if row["filename"]]
    path = linked(real, "HallusionBench.json", tmp_path, media)
    found = open_benchmark("hallusionbench", path).questions
    assert (len(rows), len(found)) == (1129, 951)
    assert Counter(q.category for q in found) == Counter(
        row["category"] for row in rows if row["visual_input"] != "0"
    )
    assert {q.target for q in found} == {"Yes", "No"}


def test_the_real_ocrbench_is_read_whole(real: Path, tmp_path: Path):
    rows = json.loads((real / "OCRBench.json").read_text())
    path = linked(real, "OCRBench.json", tmp_path, [row["image_path"] for row in rows])
    found = open_benchmark("ocrbench", path).questions
    assert len(found) == 1000 and len(Counter(q.category for q in found)) == 10
    assert sum(isinstance(q.target, list) for q in found) == 149


def test_whatsup_with_the_real_objects_and_answers_is_read_whole(real: Path, tmp_path: Path):
    """Captions are made of a re-worded copy; the published lists are not available."""
    captions = {"A": [], "B": []}
    for part, found in captions.items():
        sides = (
            ("on", "under", "left", "right")
            if part == "A"
            else ("front", "behind", "left", "right")
        )
        name = f"Controlled_Images_{part}_with_answer_four_options.jsonl"
        for line in (real / name).read_text().splitlines():
            row = json.loads(line)
            one, other = re.search(
                r"Where (?:is|are) (.*) in relation to (.*)\? ", row["question"]
            ).groups()
            first = row["answer"][0].lower()
            found.append(
                [f"{one} {side} {other}" for side in sorted(sides, key=lambda s: s != first)]
            )
    questions = open_benchmark("whatsup", files.write_whatsup(tmp_path, captions)).questions
    assert Counter(q.category for q in questions) == {"A": 412, "B": 408}
    for question in questions:
        part, number = question.id.split("-")
        assert question.options[question.target] == captions[part][int(number)][0]
    letters = Counter(q.target for q in questions)
    assert min(letters[letter] for letter in "ABCD") > 160  # shuffled: of 820, 205 are expected


# small files of every format


@pytest.mark.parametrize("name", SPECS)
def test_every_format_is_read(name: str, tmp_path: Path):
    """From the file, and from the folder that it is in, alone or below a folder of sets."""
    own = tmp_path / name
    own.mkdir()
    path = files.WRITERS[name](own)
    questions = open_benchmark(name, path).questions
    assert len(questions) == COUNTS.get(name, 4)
    for folder in (own, tmp_path):
        again = open_benchmark(name, folder).questions
        assert [q.id for q in again] == [q.id for q in questions]
    assert all(q.benchmark == name and q.target and q.category for q in questions)
    for question in questions:
        assert (question.video is None) == bool(question.images)
        for image in pickle.loads(pickle.dumps(question.images)):
            assert image.open().shape == (30, 40, 3)


def test_each_row_has_its_own_image(tmp_path: Path):
    blink = open_benchmark("blink", files.write_blink(tmp_path)).questions
    assert [[files.seed_of(p.open()) for p in q.images] for q in blink] == [
        [0, 100],
        [1, 101],
        [2, 102],
    ]
    shared = open_benchmark("mmbench", files.write_mmbench(tmp_path)).questions
    assert [files.seed_of(q.images[0].open()) for q in shared] == [241, 241, 252, 252]
    parquet = open_benchmark("qspatial_plus", files.write_qspatial(tmp_path)).questions
    assert [files.seed_of(q.images[0].open()) for q in parquet] == [0, 1, 2]


def test_a_parquet_row_without_bytes_has_its_image_beside_it(tmp_path: Path):
    path = files.write_qspatial(tmp_path, held=(0, 2))
    with pytest.raises(UserError, match="row 2 of .*there is no 1.png"):
        open_benchmark("qspatial_plus", path)
    files.write_media(tmp_path, ["1.png"])
    questions = open_benchmark("qspatial_plus", path).questions
    assert [files.seed_of(q.images[0].open()) for q in questions] == [0, 7, 2]


def test_cells_with_tabs_quotes_and_line_breaks(tmp_path: Path):
    text = 'Is it "this"\tor\nthat\r\nor – \u2028 neither?'
    rows = [files.mcq_row(i, question=text, A="’s chair\nred") for i in range(3)]
    questions = open_benchmark("realworldqa", files.write_tsv(tmp_path / "x.tsv", rows)).questions
    assert [q.text for q in questions] == [text.strip()] * 3
    assert [q.options["A"] for q in questions] == ["’s chair\nred"] * 3
    assert [files.seed_of(q.images[0].open()) for q in questions] == [0, 1, 2]


def test_a_table_with_paths_of_images(tmp_path: Path):
    rows = [files.mcq_row(0, image_path="a.png"), files.mcq_row(1, image_path="['a.png', 'b.png']")]
    rows = [{key: value for key, value in row.items() if key != "image"} for row in rows]
    files.write_media(tmp_path, ["a.png", "images/b.png"])
    questions = open_benchmark("blink", files.write_tsv(tmp_path / "x.tsv", rows)).questions
    assert [len(q.images) for q in questions] == [1, 2]


def test_images_are_not_held_in_memory(tmp_path: Path):
    """40 MB of base64 are read, and next to nothing of it is kept."""
    image = "A" * 2_000_000
    path = files.write_tsv(tmp_path / "x.tsv", [files.mcq_row(i, image=image) for i in range(20)])
    tracemalloc.start()
    questions = open_benchmark("blink", path).questions
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(questions) == 20 and kept < 1_000_000 and peak < 16_000_000


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("vsi_bench", files.write_vsi, files.write_vsi_hub),
        ("vsi_bench", files.write_vsi, files.write_vsi_tsv),
        ("viewspatial", files.write_viewspatial, files.write_viewspatial_tsv),
        ("hallusionbench", files.write_hallusion, files.write_hallusion_tsv),
        ("hallusionbench", files.write_hallusion, partial(files.write_hallusion_tsv, index=False)),
    ],
)
def test_a_benchmark_has_the_same_questions_in_each_layout(
    name: str, one: Callable[[Path], Path], other: Callable[[Path], Path], tmp_path: Path
):
    paths = [write(tmp_path) for write in (one, other)]
    found = [open_benchmark(name, path).questions for path in paths]
    a, b = (sorted(questions, key=lambda q: q.id) for questions in found)
    assert [replace(q, images=()) for q in a] == [replace(q, images=()) for q in b]
    assert [len(q.images) for q in a] == [len(q.images) for q in b]
    assert len(a) == COUNTS[name]


def test_a_file_that_is_called_test_is_taken_for_no_other_benchmark(tmp_path: Path):
    """`test.jsonl` is VSI-Bench's name on the Hub, and may be anyone's."""
    hub = files.write_vsi_hub(tmp_path)
    assert len(open_benchmark("vsi_bench", tmp_path).questions) == 2  # vsi_bench.json comes first
    hub.write_text(json.dumps(files.mcq_row(0, image_path="one.bin")))
    assert len(open_benchmark("vsi_bench", tmp_path).questions) == 2
    assert len(open_benchmark("blink", hub).questions) == 1


def test_ocrbench_of_the_kit_writes_its_answers_as_a_list(tmp_path: Path):
    row = {"index": 0, "question": "?", "answer": "['A', \"B's\"]", "category": "Doc-oriented VQA"}
    path = files.write_tsv(tmp_path / "x.tsv", [{**row, "image": files.encoded(0)}])
    assert open_benchmark("ocrbench", path).questions[0].target == ["A", "B's"]


def test_the_captions_of_whatsup_are_shuffled_by_their_id_alone(tmp_path: Path):
    questions = open_benchmark("whatsup", files.write_whatsup(tmp_path)).questions
    again = open_benchmark("whatsup", tmp_path / "controlled_clevr_dataset.json").questions
    assert [q.options for q in questions if q.category == "B"] == [q.options for q in again]


def test_mmbench_without_answers_is_for_its_server(tmp_path: Path):
    path = files.write_mmbench(tmp_path, "MMBench_TEST_EN_V11.tsv", answer=False)
    questions = open_benchmark("mmbench", path).questions
    assert [q.target for q in questions] == [None] * 4
    assert [q.meta["group"] for q in questions] == [241, 241, 252, 252]


def test_sets_name_seven_benchmarks_each():
    assert len(names_of("spatial")) == len(names_of("general")) == 7
    assert set(names_of("all")) == set(SPECS) and names_of("blink") == ("blink",)
    with pytest.raises(UserError, match="unknown benchmark 'blonk': choose among spatial, "):
        names_of("blonk")


# bad files


def refused(name: str, path: Path, match: str) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(UserError, match=match) as caught:
        open_benchmark(name, path)
    assert str(caught.value).endswith(".") or str(caught.value).endswith("?")
    return str(caught.value)


@pytest.mark.parametrize("name", SPECS)
def test_a_file_of_another_benchmark_is_refused(name: str, tmp_path: Path):
    other = "vsi_bench" if name != "vsi_bench" else "ocrbench"
    path = files.WRITERS[other](tmp_path)
    refused(name, path, f"is a file of {SPECS[other].title}, not of {re.escape(SPECS[name].title)}")
    renamed = path.rename(tmp_path / "renamed.json")
    refused(name, renamed, "is no file of .*: its rows have no ")


def test_another_files_levels_and_types_are_refused(tmp_path: Path):
    row = {**files.mcq_row(0), "category": "Chart"}
    refused("spatial457", files.write_tsv(tmp_path / "x.tsv", [row]), "row 1 of x.tsv .*'Chart'")
    refused("ocrbench", tmp_path / "x.tsv", "row 1 of x.tsv .*'Chart'")
    refused("hallusionbench", tmp_path / "x.tsv", "no l2-category")


BAD_ROWS = {
    "no answer": ({"answer": ""}, "row 2 of x.tsv has no answer"),
    "no such option": ({"answer": "D"}, "row 2 of x.tsv: its answer 'D' is none of its options"),
    "no image": ({"image": ""}, "row 2 of x.tsv has no image"),
    "no question": ({"question": " "}, "row 2 of x.tsv has no question"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_or_left_out(kind: str, tmp_path: Path):
    change, message = BAD_ROWS[kind]
    rows = [files.mcq_row(0), {**files.mcq_row(1), **change}, files.mcq_row(2)]
    path = files.write_tsv(tmp_path / "x.tsv", rows)
    refused("blink", path, f"{message}.*allow-missing")
    found = open_benchmark("blink", path, allow_missing=True)
    assert [q.id for q in found.questions] == ["0", "2"]
    assert len(found.left_out) == 1 and re.match(message, found.left_out[0])


def test_missing_images_and_videos_are_named_or_left_out(tmp_path: Path):
    view, vsi = files.write_viewspatial(tmp_path), files.write_vsi(tmp_path)
    (tmp_path / "ViewSpatial-Bench/b/1.jpg").unlink()
    refused("viewspatial", view, "row 2 of ViewSpatial-Bench.json: there is no .*b/1.jpg")
    found = open_benchmark("viewspatial", view, allow_missing=True)
    assert len(found.questions) == 1 and len(found.left_out) == 1
    (tmp_path / "rooms/1.mp4").unlink()
    refused("vsi_bench", vsi, "row 1 of vsi_bench.json: there is no rooms/1.mp4")
    with pytest.raises(UserError, match="no question that can be asked .*rooms/1.mp4"):
        open_benchmark("vsi_bench", vsi, allow_missing=True)


def test_mmbench_with_some_answers_missing(tmp_path: Path):
    rows = [files.mcq_row(0), files.mcq_row(1, answer="")]
    path = files.write_tsv(tmp_path / "x.tsv", rows)
    refused("mmbench", path, "row 2 of x.tsv has no answer")
    assert len(open_benchmark("mmbench", path, allow_missing=True).questions) == 1


def test_an_answer_of_the_wrong_kind(tmp_path: Path):
    vsi = files.write_vsi(tmp_path)
    rows = json.loads(vsi.read_text())
    rows[0]["answer"] = "many"
    refused("vsi_bench", files.write_json(vsi, rows), "row 1 .*'many' does not fit its type")
    hallusion = files.write_hallusion(tmp_path)
    rows = json.loads(hallusion.read_text())
    rows[2]["gt_answer"] = "maybe"
    refused("hallusionbench", files.write_json(hallusion, rows), "row 3 .*'maybe'")
    for name, write, column in (
        ("vsi_bench", files.write_vsi_tsv, "candidates"),
        ("viewspatial", files.write_viewspatial_tsv, "candidates"),
        ("ocrbench", files.write_ocrbench_tsv, "answer"),
    ):
        path = write(tmp_path)
        path.write_text(re.sub(r"\['A.*?\]", "['A", path.read_text()))
        refused(name, path, f"row . of .*: its {column} is no list: fix it")


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path):
    path = files.write_tsv(tmp_path / "x.tsv", [files.mcq_row(i) for i in (5, 6, 5)])
    refused("blink", path, "the id '5' occurs 2 times .row 1 of x.tsv, row 3 of x.tsv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no row"),
        (b"index\tquestion\n", "holds no row"),
        (b"index\tquestion\n1\n", "row 1 of x.tsv has 1 columns and the first line 2"),
        (b"index\tquestion\n\xff\xfe\t2\n", "x.tsv cannot be read"),
        (b"index\tquestion\timage\n1\ta\t7\n", "row 1 .*takes its image from row '7'"),
    ],
)
def test_damaged_tables_are_refused(content: bytes, message: str, tmp_path: Path):
    (tmp_path / "x.tsv").write_bytes(content)
    refused("blink", tmp_path / "x.tsv", message)


def test_damaged_json_and_unknown_endings_are_refused(tmp_path: Path):
    for name, content, message in (
        ("x.json", "[{", "x.json is not valid JSON"),
        ("x.json", '[{"question": "\\ud800"}]', "half of a character"),
        ("x.json", "[1]", "row 1 of x.json is no object"),
        ("x.csv", "", "expected a file that ends in .tsv"),
        ("x.parquet", "PAR1", "cannot be read"),
    ):
        (tmp_path / name).write_text(content)
        refused("vsi_bench", tmp_path / name, message)
    refused("vsi_bench", tmp_path / "none", "there is no such file or folder")
    refused("vsi_bench", tmp_path, "has no file of VSI-Bench: put vsi_bench.json or test.jsonl")


def test_a_image_that_is_none_is_named_when_it_is_opened(tmp_path: Path):
    path = files.write_tsv(tmp_path / "x.tsv", [files.mcq_row(0, image="x" * 100 + "!")])
    image = open_benchmark("blink", path).questions[0].images[0]
    with pytest.raises(BadImage, match="row 1 of x.tsv"):
        image.open()
