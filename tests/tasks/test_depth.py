"""Depth: answers recomputed from `truth`, constraints rechecked on the windows that it names."""

import math
from collections import Counter
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.tasks import depth, position
from spatial_ssrl_jax.tasks.example import Reject
from spatial_ssrl_jax.tasks.regions import Regions
from tests.helpers.images import ROUNDING, assert_even, depth_ends, record


def make(rec, seed, **changes):
    return depth.make(rec, np.random.default_rng(seed), depth.DepthSettings(**changes))


def check(rec, example, min_valid=0.9):
    """The paper's constraints and the answer, from the image's own depth."""
    points, half = example.truth["points"], example.truth["half"]
    height, width = rec.depth.shape
    low, high = depth_ends(rec.depth)
    near_far = []
    for (x, y), depth_mean in zip(points, example.truth["depths"], strict=True):
        assert half <= x < width - half and half <= y < height - half
        window = rec.depth[y - half : y + half + 1, x - half : x + half + 1]
        unit = np.clip((window.astype(float) - low) / (high - low), 0, 1)
        assert np.isfinite(unit).mean() >= min_valid
        unit = unit[np.isfinite(unit)]
        assert unit.max() - unit.min() < 0.15 + ROUNDING
        assert abs(unit.mean() - depth_mean) < ROUNDING
        near_far.append((unit.min(), unit.max()))
    order = sorted(range(len(points)), key=lambda i: near_far[i])
    assert example.answer == "-".join(str(i + 1) for i in order)
    for near, far in pairwise(order):
        assert near_far[far][0] - near_far[near][1] > 0.05 - ROUNDING
    radius = max(8, round(19 * min(height, width) / 768))
    for (x1, y1), (x2, y2) in combinations(points, 2):
        assert np.hypot(x1 - x2, y1 - y2) > 2 * radius
        assert max(abs(x1 - x2), abs(y1 - y2)) > 2 * half
    for x, y in points:
        assert radius <= x < width - radius and radius <= y < height - radius


@settings(deadline=None, max_examples=30)
@given(
    height=st.integers(80, 260),
    width=st.integers(80, 260),
    holes=st.sampled_from((0.0, 0.1, 0.3)),
    seed=st.integers(0, 2**20),
)
def test_constraints_and_answer(height, width, holes, seed):
    rec = record(seed % 61, height, width, holes)
    try:
        example = make(rec, seed)
    except Reject:
        assume(False)
    check(rec, example)


@pytest.mark.parametrize("size", [(112, 112), (480, 640), (768, 1024)])
def test_most_rooms_give_an_example_at_every_size(size):
    made = 0
    for seed in range(12):
        rec = record(seed, *size, holes=0.02)
        try:
            check(rec, make(rec, seed))
            made += 1
        except Reject:
            continue
    assert made >= 10


def test_only_the_markers_are_drawn():
    rec = record(4, 240, 320)
    example = make(rec, 0)
    changed = (example.images[0] != rec.image).any(axis=2)
    y, x = np.nonzero(changed)
    distance = min_distance(x, y, example.truth["points"])
    assert len(x) > 0 and distance.max() <= 8 * 1.5
    for px, py in example.truth["points"]:
        disc = example.images[0][py - 8 : py + 9, px - 8 : px + 9].astype(int)
        assert (disc == 255).all(axis=2).mean() > 0.25  # white
        assert (disc.max(axis=2) < 60).any()  # with black in it


def min_distance(x, y, points):
    return np.min([np.hypot(x - px, y - py) for px, py in points], axis=0)


def test_orders_are_even():
    rec, draws = record(6, 64, 64), 5000
    assert_even(Counter(make(rec, seed).answer for seed in range(draws)), draws, 6, 0.15)


@pytest.mark.parametrize("count", [3, 4])
def test_chains_are_drawn_evenly(count: int):
    low = np.array([0.0, 0.1, 0.1, 0.2, 0.3, 0.45, 0.5, 0.9])
    high = low + np.array([0.04, 0.05, 0.14, 0.02, 0.1, 0.1, 0.0, 0.05])
    x = np.array([10, 40, 12, 70, 100, 130, 40, 70])
    y = np.array([10, 10, 10, 10, 10, 10, 60, 60])
    found = Regions(np.zeros((90, 150), np.float32), 3, x, y, low, high)
    valid = set()
    for chain in permutations(range(8), count):
        clear = all(low[b] - high[a] > 0.05 for a, b in pairwise(chain))
        pairs = combinations(chain, 2)
        if clear and all(np.hypot(x[i] - x[j], y[i] - y[j]) > 18 for i, j in pairs):
            valid.add(chain)
    assert len(valid) > 10
    draws, limits = 200 * len(valid), depth.DepthSettings(min_gap=0.05)
    rng = np.random.default_rng(0)
    counts = Counter(
        tuple(int(i) for i in depth._draw(found, rng, limits, count, 18)) for _ in range(draws)
    )
    assert set(counts) == valid
    assert_even(counts, draws, len(valid), 0.35)


def test_no_chain_where_gaps_are_too_small():
    low = np.linspace(0, 0.9, 6)
    found = Regions(np.zeros((90, 600), np.float32), 3, np.arange(6) * 90, np.full(6, 9), low, low)
    rng = np.random.default_rng(0)
    assert depth._draw(found, rng, depth.DepthSettings(min_gap=0.17), 6, 18).tolist() == [*range(6)]
    assert depth._draw(found, rng, depth.DepthSettings(min_gap=0.19), 6, 18) is None


@pytest.mark.parametrize("count", [4, 5, 6])
def test_more_points(count: int):
    made = 0
    for seed in range(12):
        rec = record(seed, 240, 320)
        try:
            example = make(rec, seed, kinds={f"{count}_points": 1.0}, max_range=0.1)
        except Reject:
            continue
        check(rec, example)
        made += 1
        assert example.kind == f"{count}_points" and len(example.truth["points"]) == count
        assert depth.chance(example) == 1 / math.factorial(count)
    assert made >= 3
    assert depth.question(6) == (
        "The original image has six regions marked as 1, 2, 3, 4, 5, and 6. Consider the content, "
        "positional relationships, depths of the six regions and other cues, and sort the depths "
        "of the six regions from smallest to largest from the camera, where the format of the "
        "answer is 'Smallest-Second-Third-Fourth-Fifth-Largest'."
    )


def test_units_do_not_matter():
    rec = record(5, 200, 150, holes=0.05)
    other = record(5, 200, 150, depth=rec.depth * 1024)
    assert make(rec, 3).truth == make(other, 3).truth


def test_sparse_maps_need_a_lower_share():
    rec = record(5, 240, 320)
    sparse = rec.depth.copy()
    sparse[np.random.default_rng(0).random(sparse.shape) > 0.06] = np.nan
    rec = record(5, 240, 320, depth=sparse)
    with pytest.raises(Reject, match="enough valid depth"):
        make(rec, 0)
    example = make(rec, 0, min_valid=0.02, centre=1)
    check(rec, example, min_valid=0.02)


def test_rejections():
    two = np.full((112, 112), 2.0, np.float32)
    two[:, 56:] = 4
    with pytest.raises(Reject, match="no three regions"):
        make(record(0, depth=two), 0)
    with pytest.raises(Reject, match="no three regions"):
        make(record(0, 12, 12), 0)
    with pytest.raises(Reject, match="constant"):
        make(record(0, depth=np.ones((112, 112), np.float32)), 0)


@pytest.mark.parametrize("seed", range(12))
def test_released_regions_are_in_one_band_each(seed: int):
    rec = record(seed, 192, 256, holes=0.02)
    try:
        example = make(rec, seed, bands="released")
    except Reject:
        pytest.skip("this room has no such regions")
    check(rec, example)
    low, high = depth_ends(rec.depth)
    centres = [(rec.depth[y, x] - low) / (high - low) for x, y in example.truth["points"]]
    near, middle, far = np.clip(sorted(centres), 0, 1)
    assert near <= 0.3 and 0.35 <= middle <= 0.65 and far >= 0.7


def test_bands_make_wider_gaps():
    def gap(bands: str, seed: int) -> float:
        depths = sorted(make(record(seed, 192, 256), seed, bands=bands).truth["depths"])
        return min(np.diff(depths))

    seeds = [s for s in range(30) if has_example(record(s, 192, 256), s, bands="released")]
    assert len(seeds) > 5
    free, released = ([gap(bands, s) for s in seeds] for bands in ("free", "released"))
    assert np.median(released) > np.median(free)


def has_example(rec, seed: int, **changes) -> bool:
    try:
        make(rec, seed, **changes)
    except Reject:
        return False
    return True


@pytest.mark.parametrize("task", [depth, position])
def test_the_picture_fits_the_box_with_its_regions_and_markers_in_proportion(task):
    rec, settings = record(5, 192, 256), task.TASK.settings
    plain, fitted = (
        task.make(rec, np.random.default_rng(1), settings(fit_box=box)) for box in ((), (384, 384))
    )
    assert plain.truth == fitted.truth and plain.answer == fitted.answer
    assert fitted.images[0].shape == (288, 384, 3)
    assert task.TASK.sizes((192, 256), settings(fit_box=(384, 384))) == [(288, 384)]
    assert task.TASK.sizes((192, 256), settings()) == [(192, 256)]
    for x, y in plain.truth["points"]:
        small = disc(plain.images[0], x, y)
        large = disc(fitted.images[0], int((x + 0.5) * 1.5), int((y + 0.5) * 1.5))
        assert abs(large / small - 1.5) < 0.2


def disc(image: np.ndarray, x: int, y: int) -> float:
    """The side in pixels of a square as large as a marker's white; the photo has none."""
    around = image[max(y - 16, 0) : y + 17, max(x - 16, 0) : x + 17]
    return float(np.sqrt((around == 255).all(axis=2).sum()))


def test_a_box_needs_two_sides():
    with pytest.raises(UserError, match=r"fit_box=\(384,\) needs a width and a height"):
        make(record(5), 1, fit_box=(384,))
