"""How sources read their files: transparent pixels by a setting, and what links and names do."""

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax import evaluate, prepare, preview
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.config.load import load_config
from spatial_ssrl_jax.data.items import item_dataset
from spatial_ssrl_jax.data.sources import OPENERS, Reading, open_source
from spatial_ssrl_jax.tasks.flip import QUESTION
from tests.conftest import ROOT
from tests.data.test_pipeline import processor, weights  # noqa: F401  # the fixture
from tests.data.test_sources import ramp, save_depth
from tests.helpers.images import photo

SIZE = (12, 16)


def save_clear(path: Path) -> None:
    """An image whose left half is black, and whose right half is transparent black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((*SIZE, 4), np.uint8)
    pixels[:, :8, 3] = 255
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A SPEC of each kind that reads files, by kind; each holds one such image."""
    folder = tmp_path_factory.mktemp("clear")
    files = {
        "folder": ("a.png", None),
        "rgbd": ("a.png", "a_depth.npy"),
        "diode": ("a.png", "a_depth.npy"),
        "megadepth": ("dense0/imgs/a.png", "dense0/depths/a.h5"),
        "nyu": ("rgb_1.png", "sync_depth_1.png"),
    }
    for kind, (image, depth) in files.items():
        save_clear(folder / kind / image)
        if depth:
            save_depth(folder / kind / depth, ramp(SIZE))
    np.save(folder / "diode" / "a_depth_mask.npy", np.ones(SIZE))
    prepare.main(["rgbd", str(folder / "rgbd"), str(folder / "out")])
    records = folder / "out" / "ssrl_pictures" / "rgbd" / "1.0.0"
    row = {"instruction": QUESTION, "output": "\\boxed{2-0}", "images": ["folder/a.png"]}
    (folder / "sft.json").write_text(json.dumps([row]))
    own = {"problem": "What is black?", "answer": "all", "images": ["folder/a.png"]}
    (folder / "own.jsonl").write_text(json.dumps(own))
    return {kind: f"{kind}:{folder / kind}" for kind in files} | {
        "tfds": f"tfds:ssrl_pictures/rgbd@{folder / 'out'}",
        "arrayrecord": f"arrayrecord:{records}/*.array_record*",
        "ssrl81k": f"ssrl81k:{folder / 'sft.json'}",
        "questions": f"questions:{folder / 'own.jsonl'}",
        "mixture": f"folder:{folder / 'folder'}+rgbd:{folder / 'rgbd'}",
    }


@pytest.mark.parametrize("kind", [*sorted(OPENERS.keys() - {"scenes"}), "mixture"])
def test_transparent_pixels_of_every_kind_of_source(specs: dict[str, str], kind: str):
    for reading, right in ((Reading(), 255), (Reading("white"), 255), (Reading("drop"), 0)):
        source = pickle.loads(pickle.dumps(open_source(specs[kind], reading)))
        for index in range(len(source)):
            found = source[index]
            image = found.images[0] if kind in ("ssrl81k", "questions") else found.image
            assert image.shape == (*SIZE, 3)
            assert (image[:, :8] == 0).all() and (image[:, 8:] == right).all()


def test_the_papers_configs_drop_them_as_the_released_code():
    for name, value in {
        "sft_3b": "drop",
        "sft_7b": "drop",
        "grpo_3b": "drop",
        "grpo_7b": "drop",
        "grpo_3b_lora": "drop",
        "tiny": "white",
    }.items():
        data = load_config(str(ROOT / "configs" / f"{name}.py")).data
        assert (data.transparency, data.reading) == (value, Reading(value))
    allowed = load_config(str(ROOT / "configs/tiny.py"), [("data.allow_outside_paths", "true")])
    assert allowed.data.reading == Reading(allow_outside_paths=True)
    with pytest.raises(UserError, match=r"data\.transparency=black is unknown: .* white, drop"):
        load_config(str(ROOT / "configs" / "tiny.py"), [("data.transparency", "black")])


# ----------------------------------------------------------------------- read-only disks


def test_reading_writes_nothing_beside_the_data(specs: dict[str, str]):
    folder = Path(specs["folder"].removeprefix("folder:")).parent

    def content() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}

    before = content()
    for spec in specs.values():
        source = open_source(spec)
        assert source.fingerprint() and source[0]
    assert content() == before


def test_a_read_only_disk_is_named(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    line = {"id": "0", "benchmark": "blink", "category": "x", "question": "?", "target": "A"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line | {"response": "A"}))

    def refuse(path: Path, *args, **more) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    argv = [f"--score={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'out'}"]
    code, out, err = run(evaluate.main, *argv)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "out: Read-only file system: choose another folder" in err


# ------------------------------------------------------------------------ links and names


def test_an_image_that_links_to_itself_is_skipped(tmp_path: Path, processor):  # noqa: F811
    Image.fromarray(photo(1, 60, 60)).save(tmp_path / "good.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nothing")
    source = open_source(f"folder:{tmp_path}")
    assert len(source.fingerprint()) == 16
    items = item_dataset(source, range(3), weights(flip=1.0), processor, seed=0)
    found = [items[i] for i in range(9)]
    assert {item.example.source["record"] for item in found} == {"good.png"}
    assert {s.name for item in found for s in item.skipped if s.bad} == {"loop.png", "gone.png"}


def test_question_files_below_a_circle_of_links_are_read_once(tmp_path: Path):
    save_clear(tmp_path / "a.png")
    row = {"instruction": QUESTION, "output": "\\boxed{2-0}", "images": ["a.png"]}
    (tmp_path / "sft.json").write_text(json.dumps([row]))
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "loop.json").symlink_to("loop.json")
    os.remove(tmp_path / "loop.json")
    assert len(open_source(f"ssrl81k:{tmp_path}")) == 1


ODD_NAMES = [
    "a b.png",
    "-x.png",
    "%s{0}.png",
    "100%.png",
    "#1?.png",
    'quote".png',
    "日本 é.png",
    "new\nline.png",
    "<img src=x onerror=alert(1)>.png",
    "~.png",
    "*.png",
]


def test_odd_names_are_names_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture):
    """In a source, in its errors, and in a page, where they are text."""
    folder = tmp_path / "+ &<b>"
    folder.mkdir()
    for name in ODD_NAMES:
        Image.fromarray(photo(1, 60, 60)).save(folder / name)
    (folder / "bad\nname.png").write_bytes(b"")
    source = open_source(f"folder:{folder}")
    read = {source.name(i): source for i in range(len(source))}
    assert set(read) == {*ODD_NAMES, "bad\nname.png"}
    for index in range(len(source)):
        if source.name(index) != "bad\nname.png":
            assert source[index].image.shape == (60, 60, 3)
        else:
            with pytest.raises(BadImage, match="not an image"):
                source[index]
    out = tmp_path / "out"
    argv = [f"--source=folder:{folder}", f"--out={out}", "--tasks=flip", "--count=60"]
    preview.main(argv)
    page = (out / "index.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;.png" in page
    assert "<b>" not in page.split("</h1>")[0] and "+ &amp;&lt;b&gt;" in page
    rows = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    assert {row["source"]["record"] for row in rows} <= set(ODD_NAMES)


def test_the_preview_of_a_strangers_questions_is_inert(tmp_path: Path):
    evil = '<script>alert("x")</script><img src=http://evil/x.png>'
    save_clear(tmp_path / "in" / "a.png")
    row = {"instruction": f"{QUESTION} {evil}", "output": f"{evil} \\boxed{{{evil}}}"}
    (tmp_path / "in" / "sft.json").write_text(json.dumps([row | {"images": ["a.png"]}]))
    preview.main([f"--source=ssrl81k:{tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--count=1"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "alert(&quot;x&quot;)" in page and page.count("<script") == 1  # the page's own
    assert "<img src=http" not in page
