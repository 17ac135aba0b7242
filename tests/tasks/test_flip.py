"""Flip: undone, it restores the image; only a patch whose flip is visible is flipped."""

from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_ssrl_jax.tasks import flip
from spatial_ssrl_jax.tasks.example import Reject
from tests.helpers.images import assert_even, photo, record


def make(rec, seed, **changes):
    return flip.make(rec, np.random.default_rng(seed), flip.FlipSettings(**changes))


def patch_of(image, label):
    h, w = image.shape[0] // 2, image.shape[1] // 2
    y, x = label // 2 * h, label % 2 * w
    return image[y : y + h, x : x + w]


@settings(deadline=None, max_examples=40)
@given(height=st.integers(48, 150), width=st.integers(48, 150), seed=st.integers(0, 2**20))
def test_the_answer_undoes_the_flip(height, width, seed):
    rec = record(seed % 89, height, width)
    with mock.patch.object(flip, "draw_labels", lambda image, rows, cols: image):
        example = make(rec, seed)
    label, direction = (int(n) for n in example.answer.split("-"))
    image = example.images[0].copy()
    original = rec.image[: height // 2 * 2, : width // 2 * 2]
    assert (image != original).any()
    patch = patch_of(image, label)
    patch[:] = patch[::-1].copy() if direction == 0 else patch[:, ::-1].copy()
    np.testing.assert_array_equal(image, original)
    assert example.truth == {"patch": label, "direction": ("vertical", "horizontal")[direction]}
    assert example.reason == f"Patch {label} is flipped {example.truth['direction']}ly."


def test_answers_are_even():
    small, draws = record(2, 48, 48), 5000
    answers = Counter(make(small, seed).answer for seed in range(draws))
    assert_even(answers, draws, 8, 0.2)


def test_a_patch_that_looks_the_same_after_its_flip_is_left_alone():
    image = photo(5, 112, 112)
    image[:56, :56] = 100  # flat
    image[:56, 56:] = np.linspace(30, 220, 56, dtype=np.uint8)[:, None, None]  # same left to right
    turned = patch_of(image, 2).astype(int)
    half_turn = (turned + turned[::-1, ::-1]) // 2  # its two flips are the same
    image[56:, :56] = half_turn.astype(np.uint8)
    for seed in range(30):
        assert make(record(image=image), seed).truth["patch"] == 3


def test_rejections():
    with pytest.raises(Reject, match="same after its flip"):
        make(record(image=np.full((112, 112, 3), 90, np.uint8)), 0, min_contrast=0.0)
    with pytest.raises(Reject, match="too small"):
        make(record(0, 40, 200), 0)
