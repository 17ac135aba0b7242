"""Folders with every kind of bad file: usable files are used, the rest is skipped and named."""

import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spatial_ssrl_jax import preview
from spatial_ssrl_jax.checkpoint.models import open_model
from spatial_ssrl_jax.common.errors import BadImage, UserError
from spatial_ssrl_jax.config.schema import Config
from spatial_ssrl_jax.data.items import Item, SkippedRecord, item_dataset
from spatial_ssrl_jax.data.pipeline import batches
from spatial_ssrl_jax.data.processor import Processor
from spatial_ssrl_jax.data.sources import open_source
from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.crop import QUESTION as CROP
from spatial_ssrl_jax.trainer import training
from spatial_ssrl_jax.trainer.context import RunState
from tests.data.test_images import png_of_size
from tests.data.test_pipeline import weights
from tests.data.test_sources import save_depth
from tests.helpers.images import photo, room

SIZE = (112, 140)
Save = Callable[[Path], None]


def whole(path: Path) -> None:
    Image.fromarray(photo(1, *SIZE)).save(path)


def truncated(path: Path) -> None:
    whole(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def narrow(path: Path) -> None:
    Image.fromarray(photo(1, 50, 50)).resize((24_000, 100)).save(path)


BAD_IMAGES: dict[str, tuple[Save, str]] = {
    "empty.png": (lambda path: path.write_bytes(b""), "not an image"),
    "text.jpg": (lambda path: path.write_text("404 Not Found"), "not an image"),
    "cut.jpg": (truncated, "cannot be read"),
    "zero.png": (lambda path: path.write_bytes(png_of_size(0, 5)), "not an image"),
    "huge.png": (lambda path: path.write_bytes(png_of_size(12_000, 12_000)), "12000x12000.*shrink"),
    "narrow.png": (narrow, "24000x100 pixels cannot be used"),
}


def animated(path: Path) -> None:
    frames = [Image.fromarray(photo(seed, *SIZE)) for seed in (1, 2)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.fixture(scope="module")
def processor() -> Processor:
    model = open_model("tiny")
    return Processor(model.files, model.config, min_pixels=28 * 28, max_pixels=112 * 112)


def items_of(spec: str, processor: Processor, task: str, count: int) -> list[Item]:
    source = open_source(spec)
    items = item_dataset(source, range(len(source)), weights(**{task: 1.0}), processor, seed=0)
    return [items[i] for i in range(count)]


def test_a_pipe_among_the_images_is_named(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    source = open_source(f"folder:{tmp_path}")
    with pytest.raises(BadImage, match=r"pipe\.png: is no file; give one"):
        source[0]
    assert source.fingerprint() == source.fingerprint()


def test_bad_images_are_skipped_and_named(tmp_path: Path, processor: Processor):
    whole(tmp_path / "good.png")
    animated(tmp_path / "moving.png")
    for name, (save, _) in BAD_IMAGES.items():
        save(tmp_path / name)
    items = items_of(f"folder:{tmp_path}", processor, "shuffle", 24)
    assert {item.example.source["record"] for item in items} == {"good.png", "moving.png"}
    skips = {skip.name: skip for item in items for skip in item.skipped}
    assert set(skips) == set(BAD_IMAGES)
    assert all(skip.bad for skip in skips.values())


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_each_bad_image_says_why(tmp_path: Path, processor: Processor, name: str):
    save, message = BAD_IMAGES[name]
    save(tmp_path / name)
    source = open_source(f"folder:{tmp_path}")
    with pytest.raises(BadImage, match=message) as error:
        processor.grid(*source[0].image.shape[:2])
    assert str(error.value).count(".\n") == 0 and str(error.value).endswith(".")


def depth_file(change: Callable[[np.ndarray], np.ndarray]) -> Save:
    return lambda path: save_depth(path, change(room(1, *SIZE)))


def filled(value: float, fraction: float) -> Save:
    """A room in which a fraction of the rows holds `value`."""

    def change(depth: np.ndarray) -> np.ndarray:
        depth[: round(fraction * len(depth))] = value
        return depth

    return depth_file(change)


BAD_DEPTHS: dict[str, Save] = {
    "missing": lambda path: None,
    "turned": depth_file(lambda depth: depth.T),
    "zeros": filled(0.0, 1),
    "nan": filled(np.nan, 1),
    "negative": filled(-1.0, 1),
    "text": lambda path: path.write_text("no depth"),
}
USABLE_DEPTHS: dict[str, Save] = {
    "some_nan": filled(np.nan, 0.3),
    "some_negative": filled(-1.0, 0.3),
    "some_infinite": filled(np.inf, 0.3),
    "half_size": depth_file(lambda depth: depth[::2, ::2]),
    "millimetres": depth_file(lambda depth: 1000 * depth),
}


@pytest.mark.parametrize("task", ["depth", "position"])
def test_bad_depths_are_skipped_and_named(tmp_path: Path, processor: Processor, task: str):
    for name, save in (BAD_DEPTHS | USABLE_DEPTHS).items():
        whole(tmp_path / f"{name}.png")
        save(tmp_path / f"{name}_depth.npy")
    items = items_of(f"rgbd:{tmp_path}", processor, task, 33)
    used = {item.example.source["record"].removesuffix(".png") for item in items}
    assert used == set(USABLE_DEPTHS)
    skips = {skip.name.removesuffix(".png") for item in items for skip in item.skipped if skip.bad}
    assert skips == set(BAD_DEPTHS)


def test_a_constant_map_is_rejected_but_not_bad(tmp_path: Path, processor: Processor):
    for name, value in (("flat", 1.0), ("room", None)):
        whole(tmp_path / f"{name}.png")
        depth = room(1, *SIZE) if value is None else np.full(SIZE, value, np.float32)
        save_depth(tmp_path / f"{name}_depth.npy", depth)
    skips = [s for i in items_of(f"rgbd:{tmp_path}", processor, "depth", 4) for s in i.skipped]
    assert skips and {(s.name, s.reason, s.bad) for s in skips} == {
        ("flat.png", "constant depth map", False)
    }


@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_a_picture_without_content_is_rejected_but_not_bad(
    tmp_path: Path, processor: Processor, task: str, capsys: pytest.CaptureFixture
):
    whole(tmp_path / "good.png")
    Image.new("RGB", SIZE[::-1], (4, 3, 5)).save(tmp_path / "black.png")
    for name in ("good", "black"):
        save_depth(tmp_path / f"{name}_depth.npy", room(1, *SIZE))
    items = items_of(f"rgbd:{tmp_path}", processor, task, 8)
    assert {item.example.source["record"] for item in items} == {"good.png"}
    skips = {(s.name, s.reason, s.bad) for item in items for s in item.skipped}
    assert skips == {("black.png", "without content", False)}
    argv = [f"--source=rgbd:{tmp_path}", f"--tasks={task}", f"--out={tmp_path / 'look'}"]
    preview.main([*argv, "--count=8", "--json"])
    rejected = json.loads(capsys.readouterr().out.splitlines()[-1])["rejected"]
    assert set(rejected) == {f"{task}: without content"}
    preview.main(
        [*argv, "--count=8", "--json", "--overwrite", f"--config.tasks.{task}.min_contrast=0"]
    )
    rejected = json.loads(capsys.readouterr().out.splitlines()[-1])["rejected"]
    assert f"{task}: without content" not in rejected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_question_that_its_images_do_not_fit_is_a_bad_image(
    tmp_path: Path, processor: Processor, workers: int
):
    """Its file and number are named, and the run goes on."""
    whole(tmp_path / "a.png")
    rows = [{"problem": CROP, "answer": "A", "images": ["a.png"] * n} for n in (5, 5, 1)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    source = open_source(f"ssrl81k:{tmp_path}")
    items = item_dataset(source, range(3), weights(crop=1.0), processor, seed=0)
    with closing(
        batches(items, 6, 6, start=0, threads=1, workers=workers, process=0, processes=1)
    ) as stream:
        skips = {skip for item in next(stream).items for skip in item.skipped}
    (skip,) = skips
    assert skip.name == "train.parquet#2" and skip.bad
    assert "placeholders for 5 images" in skip.reason and "1 were given" in skip.reason


def test_a_run_stops_above_its_fraction_of_bad_images():
    lines: list[str] = []
    run = SimpleNamespace(
        config=Config("test"),
        source=SimpleNamespace(spec="folder:x"),
        progress=SimpleNamespace(say=lines.append),
        state=RunState(),
    )
    good, bad = (
        Item(None, None, skipped) for skipped in ((), (SkippedRecord("a.png", "cut.", True),))
    )
    training._count_bad(run, SimpleNamespace(items=[good] * 30 + [bad] * 5))
    assert (run.state.bad, run.state.tried) == (5, 40) and lines == ["skipped a.png: cut."] * 5
    with pytest.raises(UserError, match=r"data\.max_bad_fraction") as error:
        training._count_bad(run, SimpleNamespace(items=[bad] * 10))
    assert "of 60 images from folder:x" in str(error.value)
