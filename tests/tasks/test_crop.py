"""Crop: the box and every option are rebuilt here by other means."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.tasks import crop
from spatial_ssrl_jax.tasks.example import Reject
from tests.helpers.images import assert_even, photo, record

ALL = {"interior", "exterior_25", "exterior_50", "rotate_cw", "rotate_ccw"}


def make(rec, seed, **changes):
    return crop.make(rec, np.random.default_rng(seed), crop.CropSettings(**changes))


def rebuilt(image, box, kind):
    """An option from the image, by slicing first and resizing afterwards."""
    x, y, s = box
    square = image[y : y + s, x : x + s]
    if kind == "answer":
        return square
    if kind == "rotate_cw":
        return square.transpose(1, 0, 2)[:, ::-1]
    if kind == "rotate_ccw":
        return square.transpose(1, 0, 2)[::-1]
    if kind == "interior":
        shown = square[s // 4 : 3 * s // 4, s // 4 : 3 * s // 4]
    else:
        grow = round(s * int(kind[-2:]) / 100)
        side = min(s + 2 * grow, *image.shape[:2])
        x, y = x - grow, y - grow
        x -= max(0, x + side - image.shape[1])
        y -= max(0, y + side - image.shape[0])
        x, y = max(x, 0), max(y, 0)
        shown = image[y : y + side, x : x + side]
        assert shown.shape == (side, side, 3)
    return np.asarray(Image.fromarray(shown).resize((s, s), Image.Resampling.BICUBIC))


def block_means(image):
    """[8, 8, 3] mean colours, another way than the task's thumbnails."""
    edges = np.linspace(0, len(image), 9).astype(int)
    rows = [image[a:b].mean(axis=0) for a, b in zip(edges, edges[1:], strict=False)]
    rows = np.stack(rows)
    return np.stack([rows[:, a:b].mean(axis=1) for a, b in zip(edges, edges[1:], strict=False)])


@settings(deadline=None, max_examples=40)
@given(height=st.integers(56, 220), width=st.integers(56, 220), seed=st.integers(0, 2**20))
def test_box_and_options(height, width, seed):
    rec = record(seed % 83, height, width)
    try:
        example = make(rec, seed)
    except Reject:
        assume(False)
    x, y, s = example.truth["box"]
    kinds = example.truth["options"]
    assert s == min(height, width) // 2
    assert 0 <= x <= width - s and 0 <= y <= height - s
    holed = rec.image.copy()
    holed[y : y + s, x : x + s] = 0
    np.testing.assert_array_equal(example.images[0], holed)
    assert kinds.count("answer") == 1 and len(set(kinds)) == 4 and set(kinds) <= ALL | {"answer"}
    assert example.answer == "ABCD"[kinds.index("answer")]
    for kind, image in zip(kinds, example.images[1:], strict=True):
        np.testing.assert_array_equal(image, rebuilt(rec.image, (x, y, s), kind))
    for i in range(4):
        for j in range(i):
            apart = np.abs(block_means(example.images[1 + i]) - block_means(example.images[1 + j]))
            assert apart.mean() > 1.5


def test_letters_positions_and_distractors_are_uniform():
    small, draws = record(2, 64, 80), 5000
    letters, wrong, positions = Counter(), Counter(), Counter()
    for seed in range(draws):
        example = make(small, seed, min_difference=0.5)
        letters[example.answer] += 1
        wrong.update(k for k in example.truth["options"] if k != "answer")
        positions[example.truth["box"][0]] += 1
    assert_even(letters, draws, 4, 0.15)
    assert_even(wrong, 3 * draws, 5, 0.1)
    assert_even(positions, draws, 49, 0.6)


def test_a_distractor_equal_to_the_answer_is_passed_over():
    image = photo(3, 112, 112).astype(int)
    symmetric = np.stack([np.rot90(image, k) for k in range(4)]).mean(axis=0)  # same after any turn
    rec = record(image=symmetric.astype(np.uint8))
    settings_ = crop.CropSettings()
    framed = crop._FramedImage(Image.fromarray(rec.image), (0, 0, 112, 112))
    centred = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        centred |= set(crop._distractors(framed, (28, 28, 56), settings_, rng))
    assert centred == {"interior", "exterior_25", "exterior_50"}  # its turns are the answer itself


def test_rejections_and_settings():
    with pytest.raises(Reject, match="options look alike"):
        make(record(image=np.full((112, 112, 3), 90, np.uint8)), 0, min_contrast=0.0)
    with pytest.raises(Reject, match="too small"):
        make(record(0, 50, 200), 0)
    with pytest.raises(UserError, match="at least three"):
        make(record(0), 0, distractors={"interior": 1.0, "rotate_cw": 1.0})
    only = {"interior": 1.0, "rotate_cw": 1.0, "exterior_50": 1.0, "exterior_25": 0.0}
    options = {k for s in range(20) for k in make(record(0), s, distractors=only).truth["options"]}
    assert options == {"interior", "rotate_cw", "exterior_50", "answer"}
