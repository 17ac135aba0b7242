"""Pictures without content: what is one, and that every task rejects it."""

import dataclasses
import time

import numpy as np
import pytest
from PIL import Image

from spatial_ssrl_jax.tasks import TASKS
from spatial_ssrl_jax.tasks.content import MIN_CONTRAST, contrast
from spatial_ssrl_jax.tasks.example import Reject
from tests.conftest import ROOT
from tests.helpers.images import photo, record

SHARED = ROOT.parent / "shared"
SIZE = (240, 320, 3)
Y, X = np.mgrid[-1:1:240j, -1:1:320j]


def grey(level: float | np.ndarray, noise: float = 0.0) -> np.ndarray:
    """One level, or a level for each pixel, with normal noise: [240, 320, 3] uint8."""
    levels = np.broadcast_to(np.asarray(level, float).reshape(*np.shape(level), 1), SIZE)
    return np.clip(levels + np.random.default_rng(0).normal(0, noise, SIZE), 0, 255).astype(
        np.uint8
    )


def framed(image: np.ndarray) -> np.ndarray:
    """The image with white bars to its left and right."""
    image = image.copy()
    image[:, :20], image[:, -20:] = 255, 255
    return image


NIGHT = grey(4, 2)
NIGHT[100:130, 150:180] = 250  # a moon
PLACEHOLDER = grey(255)
PLACEHOLDER[112:128:2, 110:210:3] = 90  # a line of small grey letters

EMPTY = {
    "black": grey(0),
    "white": grey(255),
    "one colour": np.full(SIZE, (30, 60, 200), np.uint8),
    "black with the sensor's noise": np.abs(grey(0, 20)),
    "one colour with much noise": grey(128, 40),
    "a covered lens": grey(10 * (1 - 0.5 * (X**2 + Y**2)) + 6, 3),
    "a photo at a fiftieth of its light": photo(1, *SIZE[:2]) // 50,
    "dense fog": photo(1, *SIZE[:2]) // 40 + 200,
    "a placeholder": PLACEHOLDER,
    "one colour in a frame": framed(grey(90)),
}
FULL = {
    "a photo": photo(1, *SIZE[:2]),
    "a photo at a fifth of its light": photo(1, *SIZE[:2]) // 5,
    "fog": photo(1, *SIZE[:2]) // 5 + 180,
    "a moon": NIGHT,
    "a clear sky": grey(200 + 40 * Y),
    "another half": grey(np.where(X > 0, 90.0, 110.0)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_every_task_rejects_a_picture_without_content(name: str):
    rec = record(1, *SIZE[:2], image=EMPTY[name])
    assert contrast(rec.image) < MIN_CONTRAST
    for task in TASKS:
        with pytest.raises(Reject, match="^without content$"):
            task.make(rec, np.random.default_rng(0), task.settings())


@pytest.mark.parametrize("name", FULL)
def test_others_have_content(name: str):
    assert contrast(FULL[name]) > 1.3 * MIN_CONTRAST


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.name)
def test_the_limit_is_a_setting(task):
    def content(image: np.ndarray, limit: float) -> bool:
        settings = dataclasses.replace(task.settings(), min_contrast=limit)
        try:
            task.make(record(1, *SIZE[:2], image=image), np.random.default_rng(0), settings)
        except Reject as reason:
            return str(reason) != "without content"
        return True

    dim = FULL["a photo at a fifth of its light"]
    assert content(EMPTY["black"], 0.0) and content(dim, contrast(dim) - 0.01)
    assert not content(dim, contrast(dim) + 0.01)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder shared/ beside the repository")
def test_photos_have_far_more_contrast():
    photos = [*SHARED.glob("photos/*.jpg"), *SHARED.glob("rgbd/nyu*/*/rgb_*.jpg")]
    photos += [*SHARED.glob("rgbd/diode/**/*.png"), *SHARED.glob("rgbd/megadepth/**/*.jpg")]
    assert len(photos) == 8
    for path in photos:
        with Image.open(path) as image:
            assert contrast(np.asarray(image.convert("RGB"))) > 8 * MIN_CONTRAST, path


def test_it_costs_little():
    image, spent = photo(1, 864, 1152), []
    for _ in range(9):
        start = time.thread_time()
        contrast(image)
        spent.append(time.thread_time() - start)
    assert np.median(spent) < 5e-3  # 0.6 ms on one core of 2020
