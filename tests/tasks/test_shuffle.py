"""Shuffle: undone, it restores the image; its answers are even and never the identity."""

from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spatial_ssrl_jax.tasks import shuffle
from spatial_ssrl_jax.tasks.example import Reject
from tests.helpers.images import assert_even, photo, record

KINDS = ("2x2", "2x2_masked", "1x3", "1x4", "3x1", "4x1", "3x3")


def make(rec, seed, **changes):
    return shuffle.make(rec, np.random.default_rng(seed), shuffle.ShuffleSettings(**changes))


def without_labels(rec, seed, **changes):
    with mock.patch.object(shuffle, "draw_labels", lambda image, rows, cols: image):
        return make(rec, seed, **changes)


def restore(image, answer, rows, cols):
    """The original image, from the answer alone: the label at each original position."""
    height, width = image.shape[0] // rows, image.shape[1] // cols
    whole = np.zeros_like(image)
    for position, label in enumerate(int(n) for n in answer.split("-")):
        to_y, to_x = position // cols * height, position % cols * width
        y, x = label // cols * height, label % cols * width
        whole[to_y : to_y + height, to_x : to_x + width] = image[y : y + height, x : x + width]
    return whole


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    height=st.integers(96, 170),
    width=st.integers(96, 170),
    seed=st.integers(0, 2**20),
)
def test_the_answer_restores_the_image(kind, height, width, seed):
    rec = record(seed % 97, height, width)
    try:
        example = without_labels(rec, seed, kinds={kind: 1.0})
    except Reject:
        assume(False)
    truth = example.truth
    rows, cols = truth["rows"], truth["cols"]
    assert (rows, cols) == tuple(int(n) for n in kind[:3].split("x"))
    whole = restore(example.images[0], example.answer, rows, cols)
    original = rec.image[: height // rows * rows, : width // cols * cols].copy()
    assert whole.shape == original.shape
    if kind == "2x2_masked":
        patch = truth["permutation"][truth["masked"]]
        h, w = height // 2, width // 2
        y, x = patch // 2 * h, patch % 2 * w
        assert (whole[y : y + h, x : x + w] == 255).all()
        original[y : y + h, x : x + w] = 255
    else:
        assert truth["masked"] is None
    np.testing.assert_array_equal(whole, original)


@pytest.mark.parametrize("kind", KINDS)
def test_truth_gives_the_answer(kind):
    for seed in range(20):
        example = make(record(seed), seed, kinds={kind: 1.0})
        permutation = example.truth["permutation"]
        labels = [permutation.index(i) for i in range(len(permutation))]
        assert example.answer == "-".join(map(str, labels))
        assert example.reason == f"The order is {', '.join(map(str, labels))}."
        assert example.kind == kind


@pytest.mark.parametrize("kind", ["2x2", "1x4", "3x1"])
def test_labels_cover_little_and_stand_by_place_not_by_patch(kind):
    drawn, permutations = [], set()
    for seed in range(6):
        rec = record(3 + seed, 240, 320)
        plain = without_labels(rec, seed, kinds={kind: 1.0})
        labelled = make(rec, seed, kinds={kind: 1.0})
        permutations.add(tuple(plain.truth["permutation"]))
        changed = (plain.images[0] != labelled.images[0]).any(axis=2)
        assert 0 < changed.mean() < 0.2
        red = (labelled.images[0] == (255, 0, 0)).all(axis=2)
        assert red[0].mean() > 0.9 and red[:, 0].mean() > 0.9
        white = (labelled.images[0] >= 240).all(axis=2)
        drawn.append(np.stack([red, white]))  # neither is in a synthetic image
    assert len(permutations) > 1
    # The same is drawn at the same positions whichever patch is there: labels reveal nothing.
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])


def test_answers_are_even_and_never_the_identity():
    small = record(1, 48, 48)
    draws = 5000
    counts = Counter(make(small, seed, kinds={"2x2": 1.0}).answer for seed in range(draws))
    assert "0-1-2-3" not in counts
    assert_even(counts, draws, 23, 0.35)


def test_default_shares_are_the_papers():
    small = record(1, 96, 96)
    counts = Counter(make(small, seed).kind for seed in range(2000))
    for kind, expected in zip(KINDS, (4000, 4028, 2495.5, 2495.5, 1504.5, 1504.5, 0), strict=True):
        assert abs(counts[kind] / 2000 - expected / 16028) < 0.035


def test_a_white_patch_beside_the_mask_would_be_ambiguous():
    image = photo(2, 112, 112)
    image[:56, 56:] = 255
    for seed in range(20):
        example = make(record(image=image), seed, kinds={"2x2_masked": 1.0})
        masked = example.truth["permutation"][example.truth["masked"]]
        assert masked == 1


def test_the_mask_may_hide_a_patch_that_looks_like_another():
    image = photo(2, 112, 112)
    image[:56, 56:] = image[:56, :56]
    masks = set()
    for seed in range(30):
        with pytest.raises(Reject, match="two patches look alike"):
            make(record(image=image), seed, kinds={"2x2": 1.0})
        example = make(record(image=image), seed, kinds={"2x2_masked": 1.0})
        masks.add(example.truth["permutation"][example.truth["masked"]])
    assert masks == {0, 1}


def test_rejections():
    flat = record(image=np.full((112, 112, 3), 90, np.uint8))
    for kind in KINDS:
        with pytest.raises(Reject, match="two patches look alike"):
            make(flat, 0, kinds={kind: 1.0}, min_contrast=0.0)
    with pytest.raises(Reject, match="too small"):
        make(record(0, 40, 200), 0, kinds={"2x2": 1.0})
