"""Window statistics against brute force, on dense, holed, sparse and scaled maps."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_ssrl_jax.tasks import regions
from spatial_ssrl_jax.tasks.depth import TASK as DEPTH
from spatial_ssrl_jax.tasks.example import Reject, Task
from spatial_ssrl_jax.tasks.position import TASK as POSITION
from spatial_ssrl_jax.tasks.record import Record
from tests.helpers.images import record, room

LIMITS = {"max_range": 0.15, "min_valid": 0.9, "centre": 7}


def brute_force(depth, half, max_range, min_valid, centre, margin):
    """{(x, y): (low, high)} of the valid windows, one at a time."""
    found, edge, inner = {}, max(half, margin), min(centre // 2, half)
    for y in range(edge, depth.shape[0] - edge):
        for x in range(edge, depth.shape[1] - edge):
            window = depth[y - half : y + half + 1, x - half : x + half + 1]
            middle = depth[y - inner : y + inner + 1, x - inner : x + inner + 1]
            valid = window[~np.isnan(window)].astype(float)
            if np.isnan(middle).any() or valid.size < min_valid * window.size - 1e-9:
                continue
            if valid.max() - valid.min() < max_range:
                found[x, y] = (valid.min(), valid.max())
    return found


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(10, 45),
    width=st.integers(10, 45),
    half=st.integers(1, 8),
    margin=st.integers(0, 9),
    holes=st.sampled_from((0.0, 0.05, 0.4)),
    min_valid=st.sampled_from((0.9, 0.5, 0.05)),
    centre=st.sampled_from((1, 3, 7)),
    centres=st.sampled_from((40, 32_768)),
    seed=st.integers(0, 1000),
)
def test_finds_exactly_the_valid_windows(
    height, width, half, margin, holes, min_valid, centre, centres, seed
):
    """At every pixel, and on a grid of some 40 centres, which may be further apart than wide."""
    depth = room(seed, height, width, holes) / 9
    wanted = brute_force(depth, half, 0.15, min_valid, centre, margin)
    stride, rng = max(1, round(np.sqrt(depth.size / centres))), np.random.default_rng(0)
    y, x = (regions._centres(size, max(half, margin), stride, rng) for size in depth.shape)
    wanted = {at: ends for at, ends in wanted.items() if at[0] in x and at[1] in y}
    limits = regions.WindowLimits(half, 0.15, min_valid, centre, margin)
    with mock.patch.object(regions, "_CENTRES", centres):
        found = regions.find_regions(depth, limits, np.random.default_rng(0))
    got = {found.point(i): (found.low[i], found.high[i]) for i in range(len(found))}
    assert got == wanted


def test_a_large_map_is_looked_at_on_a_grid_whose_offset_is_drawn():
    depth = np.zeros((600, 800), np.float32)
    limits = regions.WindowLimits(half=9, margin=20, **LIMITS)
    seen = set()
    for seed in range(60):
        found = regions.find_regions(depth, limits, np.random.default_rng(seed))
        step = int(np.diff(np.unique(found.x))[0])
        assert 20_000 < len(found) < 45_000
        assert found.x.min() >= 20 and found.x.max() < 780
        assert found.y.min() >= 20 and found.y.max() < 580
        seen.add((int(found.x[0]) % step, int(found.y[0]) % step))
    assert len(seen) == step * step


@pytest.mark.parametrize("shape", [(5, 5), (14, 300), (300, 14), (15, 15)])
def test_a_map_smaller_than_a_window_has_no_or_few_regions(shape):
    limits = regions.WindowLimits(half=7, margin=0, **LIMITS)
    found = regions.find_regions(np.zeros(shape, np.float32), limits, np.random.default_rng(0))
    assert len(found) == (1 if shape == (15, 15) else 0)


@pytest.mark.parametrize(
    ("x", "y", "distance", "apart"),
    [(6, 6, 0, False), (7, 0, 0, True), (7, 7, 10, False), (8, 7, 10, True), (0, 10, 10, False)],
)
def test_windows_apart_are_disjoint_and_further_than_a_distance(x, y, distance, apart):
    xs, ys = np.array([20, 20 - x]), np.array([30, 30 + y])
    found = regions.Regions(np.zeros((50, 50)), 3, xs, ys, np.zeros(2), np.zeros(2))
    assert found.apart(0, slice(1, None), distance).tolist() == [apart]


def test_normalised_depth_ignores_scale_and_outliers():
    rec = record(3, 90, 120, holes=0.1)
    unit = regions.normalised_depth(rec)
    np.testing.assert_array_equal(np.isnan(unit), np.isnan(rec.depth))
    assert np.nanmin(unit) == 0 and np.nanmax(unit) == 1
    low, high = np.nanpercentile(rec.depth, (0.5, 99.5))
    expected = np.clip((rec.depth - low) / (high - low), 0, 1)
    np.testing.assert_allclose(unit, expected, atol=2e-6)
    millimetres = regions.normalised_depth(record(3, depth=rec.depth * 1000, image=rec.image))
    np.testing.assert_allclose(millimetres, unit, atol=2e-6)
    spoiled = rec.depth.copy()
    spoiled[0, 0], spoiled[1, 1] = np.inf, -np.inf
    got = regions.normalised_depth(record(3, depth=spoiled, image=rec.image))
    assert np.isnan(got[0, 0]) and np.isnan(got[1, 1])


def test_percentiles_of_a_large_map_are_about_those_of_all_pixels():
    rec = record(3, 768, 1024)
    low, high = np.nanpercentile(rec.depth, (0.5, 99.5))
    expected = np.clip((rec.depth - low) / (high - low), 0, 1)
    np.testing.assert_allclose(regions.normalised_depth(rec), expected, atol=0.02)


@pytest.mark.parametrize(
    ("depth", "reason"),
    [
        (None, "no depth map"),
        (np.ones((50, 112), np.float32), "another size"),
        (np.full((112, 112), np.nan, np.float32), "without valid pixels"),
        (np.full((112, 112), 3.5, np.float32), "constant"),
    ],
)
def test_maps_that_say_nothing_are_rejected(depth, reason):
    with pytest.raises(Reject, match=reason):
        regions.normalised_depth(record(0, depth=depth))


# ------------------------------------------------------------------------------ sparse maps


def sparse(share: float) -> Record:
    """A room of which some pixels have depth."""
    has_depth = np.random.default_rng(0).random((224, 224)) < share
    return record(0, 224, 224, depth=np.where(has_depth, room(0, 224, 224), np.float32(np.nan)))


@pytest.mark.parametrize("task", [DEPTH, POSITION], ids=lambda task: task.name)
@pytest.mark.parametrize("share", [0.06, 0.2])
def test_sparse_maps_are_rejected_by_the_settings_that_allow_them(task: Task, share: float):
    plain, rng = task.settings(), np.random.default_rng(0)
    named = rf"enough valid depth.*tasks\.{task.name}\.min_valid and tasks\.{task.name}\.centre"
    for strict in (plain, replace(plain, min_valid=0.01), replace(plain, centre=1)):
        with pytest.raises(Reject, match=named):
            task.make(sparse(share), rng, strict)
    assert task.make(sparse(share), rng, replace(plain, min_valid=share / 4, centre=1)).answer


@pytest.mark.parametrize("task", [DEPTH, POSITION], ids=lambda task: task.name)
def test_dense_maps_are_rejected_by_their_depth(task: Task):
    step = np.ones((224, 224), np.float32)
    step[:, 200:] = 2
    plain = task.settings()
    clear = plain if task is DEPTH else replace(plain, plane=1e6, depth=1.0)
    with pytest.raises(Reject, match="^no .* clearly (different depth|apart)$"):
        task.make(record(0, 224, 224, depth=step), np.random.default_rng(0), clear)
