"""What holds for every task: determinism, JSON, frames, speed, and the real samples."""

import dataclasses
import json
import time
from collections import Counter

import h5py
import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.tasks import TASKS, TASKS_BY_NAME, drawing, frame
from spatial_ssrl_jax.tasks.example import Reject
from spatial_ssrl_jax.tasks.weights import weighted_choice, weighted_shuffle
from tests.conftest import ROOT
from tests.helpers.images import photo, record
from tests.tasks import test_depth, test_position

RGBD = ROOT.parent / "shared" / "rgbd"
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)


@every_task
def test_same_state_same_example(task):
    for seed in range(5):
        a, b = (
            task.make(record(2), np.random.default_rng(seed), task.settings()) for _ in range(2)
        )
        assert (a.question, a.answer, a.reason, a.truth) == (
            b.question,
            b.answer,
            b.reason,
            b.truth,
        )
        for image_a, image_b in zip(a.images, b.images, strict=True):
            np.testing.assert_array_equal(image_a, image_b)
    others = {
        json.dumps(task.make(record(2), np.random.default_rng(s), task.settings()).truth)
        for s in range(10)
    }
    assert len(others) > 3


@pytest.mark.parametrize("task", [t for t in TASKS if t.name != "position"], ids=lambda t: t.name)
def test_chance_is_one_in_all_answers(task):
    """Of a position's directions those that the question leaves, see `test_position`."""
    answers: dict[int, dict[str, float]] = {}
    for seed in range(300):
        example = task.make(record(2), np.random.default_rng(seed), task.settings())
        answers.setdefault(len(example.answer), {})[example.answer] = task.chance(example)
    for alike in answers.values():
        assert set(alike.values()) == {1 / len(alike)}


@every_task
def test_form_of_an_example(task):
    rec = record(2)
    before = rec.image.copy(), rec.depth.copy()
    example = task.make(rec, np.random.default_rng(1), task.settings())
    np.testing.assert_array_equal(rec.image, before[0])
    np.testing.assert_array_equal(rec.depth, before[1])
    assert example.task == task.name
    assert example.source == {
        "spec": "synthetic:",
        "record": "synthetic-2",
        "image": "/synthetic/2.png",
    }
    assert json.loads(json.dumps(example.truth)) == example.truth
    assert len(example.reason.split()) <= 30
    for image in example.images:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@every_task
def test_settings_are_simple_and_the_weights_are_the_papers(task):
    settings = task.settings()
    paper = {"shuffle": 16028, "flip": 4005, "crop": 20200, "depth": 20620, "position": 20200}
    assert settings.weight == paper.get(task.name, settings.weight) >= 0  # others: any weight
    for value in dataclasses.asdict(settings).values():
        assert isinstance(value, (int, float, str, bool, tuple, dict))


@every_task
def test_images_of_any_size_give_an_example_or_a_reason(task):
    for size in [(1, 1), (3, 500), (500, 3), (30, 30), (57, 41), (60, 900), (331, 97)]:
        for seed in range(3):
            try:
                task.make(record(seed, *size), np.random.default_rng(seed), task.settings())
            except Reject as reject:
                reason = str(reject)
                assert 3 <= len(reason) < 60 and not any(c.isdigit() for c in reason)


@every_task
@pytest.mark.parametrize("size", [(480, 640), (768, 1024)])
def test_speed(task, size):
    """Processor time, in which other programs do not count; bounds are several times the aim."""
    rec, seconds = record(1, *size, holes=0.02), []
    for seed in range(7):
        start = time.thread_time()
        task.make(rec, np.random.default_rng(seed), task.settings())
        seconds.append(time.thread_time() - start)
    aim = 0.04 if task.needs_depth else 0.008 * size[0] * size[1] / (480 * 640)
    print(f"measured {task.name} {size[1]}x{size[0]}: {1e3 * np.median(seconds):.1f} ms")
    assert np.median(seconds) < 4 * aim


@pytest.mark.parametrize("colour", [0, 255])
def test_a_frame_is_found_and_never_shows(colour):
    inner = photo(3, 200, 280)
    image = np.full((220, 310, 3), colour, np.uint8)
    image[8:208, 12:292] = inner
    box = (14, 10, 290, 206)
    assert frame.inner_box(image) == box
    framed = record(3, image=image, depth=None)
    for name in ("shuffle", "flip"):
        task = TASKS_BY_NAME[name]
        example = task.make(framed, np.random.default_rng(0), task.settings())
        assert example.truth["frame"] == [14, 10, 276, 196]
        kept = task.make(framed, np.random.default_rng(0), task.settings(trim_frame=False))
        assert "frame" not in kept.truth
        assert kept.images[0].shape[0] > example.images[0].shape[0]
    task = TASKS_BY_NAME["crop"]
    for seed in range(30):
        example = task.make(framed, np.random.default_rng(seed), task.settings())
        x, y, size = example.truth["box"]
        assert size == 110 and 14 <= x <= 290 - 110 and 10 <= y <= 206 - 110
        for option in example.images[1:]:
            flat = (np.abs(option.astype(int) - colour).max(axis=2) <= 4).mean(axis=1)
            assert flat.max() < 0.5


def test_a_plain_sky_and_a_night_are_no_frame():
    image = photo(3, 200, 280)
    whole = (0, 0, 280, 200)
    assert frame.inner_box(image) == whole
    sky = image.copy()
    sky[:70] = 255
    assert frame.inner_box(sky) == whole
    night = np.zeros_like(image)
    night[90:110, 130:150] = 200
    assert frame.inner_box(night) == whole
    assert frame.inner_box(np.zeros((1, 1, 3), np.uint8)) == (0, 0, 1, 1)


def test_digits_of_markers_and_labels_are_readable_on_small_images():
    grey = np.full((112, 112, 3), 128, np.uint8)
    marked = drawing.draw_markers(grey, [(30, 30), (80, 80)], 8)
    ink = (marked[26:35, 28:33] < 80).all(axis=2)  # inside the ring around (30, 30)
    assert ink.any(axis=1).sum() >= 7
    shape = (marked[22:39, 22:39] != 128).any(axis=2)
    assert shape.any(axis=1).all() and shape.any(axis=0).all()
    labelled = drawing.draw_labels(grey, 2, 2)
    white = (labelled > 200).all(axis=2)
    for top, left in ((0, 0), (0, 56), (56, 0), (56, 56)):
        rows = np.flatnonzero(white[top : top + 28, left : left + 28].any(axis=1))
        assert 7 <= len(rows) <= 12


def test_shares():
    rng = np.random.default_rng(0)
    drawn = Counter(weighted_choice(rng, {"a": 3.0, "b": 1.0, "c": 0.0}) for _ in range(2000))
    assert set(drawn) == {"a", "b"} and abs(drawn["a"] / 2000 - 0.75) < 0.04
    orders = Counter(tuple(weighted_shuffle(rng, {"a": 3.0, "b": 1.0})) for _ in range(2000))
    assert abs(orders["a", "b"] / 2000 - 0.75) < 0.04
    for bad in ({"a": 0.0}, {"a": 1.0, "b": -1.0}):
        with pytest.raises(UserError, match="above 0"):
            weighted_choice(rng, bad)


def real_records():
    """The real samples, read here without the project's sources."""
    if not RGBD.is_dir():
        pytest.skip(f"{RGBD} is missing: it holds the real RGB-D samples.")
    scan = RGBD / "diode/val/outdoor/scene_00000/scan_00000"
    stem = "00000_00000_outdoor_000_000"
    depth = np.load(scan / f"{stem}_depth.npy").squeeze()
    depth = np.where(np.load(scan / f"{stem}_depth_mask.npy") > 0, depth, 0)
    yield real_record(scan / f"{stem}.png", depth)
    dense = RGBD / "megadepth/0000/dense0"
    with h5py.File(dense / "depths/0000000001_o.h5") as file:
        yield real_record(dense / "imgs/0000000001_o.jpg", file["depth"][()])
    for path in sorted((RGBD / "nyu_depth_v2").glob("*/rgb_*.jpg")):
        name = path.name.replace("rgb", "sync_depth").replace("jpg", "png")
        yield real_record(path, np.asarray(Image.open(path.with_name(name))) / 1000)


def real_record(path, depth):
    image = np.asarray(Image.open(path).convert("RGB"))
    depth = np.where(np.isfinite(depth) & (depth > 0), depth, np.nan).astype(np.float32)
    return record(image=image, depth=depth, name=path.name)


@every_task
def test_real_samples(task):
    """Most draws give an example, and each passes the same checks as synthetic images."""
    checks = {"depth": test_depth.check, "position": test_position.check}
    for rec in real_records():
        made = 0
        for seed in range(8):
            try:
                example = task.make(rec, np.random.default_rng(seed), task.settings())
            except Reject:
                continue
            made += 1
            if task.name in checks:
                checks[task.name](rec, example)
        print(f"measured {task.name} on {rec.name}: {made} of 8")
        assert made >= 6
