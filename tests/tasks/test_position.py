"""Position: directions recomputed from `truth` by plain geometry; thresholds and options."""

import re
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spatial_ssrl_jax.tasks import position
from spatial_ssrl_jax.tasks.example import Reject
from spatial_ssrl_jax.tasks.places import places_in_words
from spatial_ssrl_jax.tasks.regions import Regions
from tests.helpers.images import ROUNDING, assert_even, depth_ends, record

# What a person standing in the image has before and at the right hand: (x, z) in the image.
AHEAD = {"away": (0, 1), "towards": (0, -1), "left": (-1, 0), "right": (1, 0)}
RIGHT_HAND = {"away": (1, 0), "towards": (-1, 0), "left": (0, 1), "right": (0, -1)}
WORDS = {
    "left": "to the left of the image",
    "right": "to the right of the image",
    "towards": "to me",
    "away": "to away from me",
}
SINGLE = {"Left", "Right", "Front", "Back"}
COMBINED = {"Left-Front", "Left-Back", "Right-Front", "Right-Back"}


def make(rec, seed, **changes):
    return position.make(rec, np.random.default_rng(seed), position.PositionSettings(**changes))


def expected_direction(truth, plane, clear=0.25):
    here, there = truth["camera"] - 1, 2 - truth["camera"]
    dx = truth["points"][there][0] - truth["points"][here][0]
    dz = truth["depths"][there] - truth["depths"][here]
    dx, dz = dx if abs(dx) > plane else 0, dz if abs(dz) > clear else 0
    ahead, right = AHEAD[truth["heading"]], RIGHT_HAND[truth["heading"]]
    side, front = dx * right[0] + dz * right[1], dx * ahead[0] + dz * ahead[1]
    names = ["Right" if side > 0 else "Left"] if side else []
    names += ["Front" if front > 0 else "Back"] if front else []
    return "-".join(names)


def check(rec, example, min_valid=0.9):
    truth = example.truth
    height, width = rec.depth.shape
    factor = min(height, width) / 768
    right = expected_direction(truth, 150 * factor)
    options = dict(re.findall(r" ([A-D])\. ([A-Za-z-]+)", example.question))
    combined = "-" in right
    assert set(options) == set("ABCD")
    assert set(options.values()) == (COMBINED if combined else SINGLE)
    assert options[example.answer] == right
    camera = truth["camera"]
    camera_text = (
        f"camera at position '{camera}' and it's facing {WORDS[truth['heading']]}. According "
    )
    assert camera_text in example.question and f"region marker '{3 - camera}'?" in example.question
    (x1, y1), (x2, y2) = truth["points"]
    near = truth["kind"] == "near"
    assert ("ignore the height" in example.question) != near
    assert combined == (truth["kind"] == "far_combined")
    assert example.kind == truth["kind"]
    if near:
        assert abs(y1 - y2) < max(30 * factor, 4) and abs(x1 - x2) > 150 * factor
        assert abs(truth["depths"][0] - truth["depths"][1]) <= 0.25
    else:
        assert abs(truth["depths"][0] - truth["depths"][1]) > 0.25
        assert (abs(x1 - x2) > 150 * factor) == combined
    check_regions(rec, truth, max(7, round(15 * factor)) // 2, min_valid)
    dx, dz = (
        values[2 - camera] - values[camera - 1]
        for values in ([x for x, _ in truth["points"]], truth["depths"])
    )
    words = ["right" if dx > 0 else "left"] if abs(dx) > 150 * factor else []
    words += ["farther" if dz > 0 else "nearer"] if abs(dz) > 0.25 else []
    assert example.reason == (
        f"{places_in_words(truth['points'], rec.image.shape)} "
        f"From {camera}, region {3 - camera} lies {' and '.join(words)} in the image. "
        f"Seen from {camera} the region is {right}, option {example.answer}."
    )


def check_regions(rec, truth, half, min_valid):
    height, width = rec.depth.shape
    low, high = depth_ends(rec.depth)
    radius = max(8, round(19 * min(height, width) / 768))
    for (x, y), depth_mean in zip(truth["points"], truth["depths"], strict=True):
        window = rec.depth[y - half : y + half + 1, x - half : x + half + 1]
        assert window.shape == (2 * half + 1,) * 2
        unit = np.clip((window.astype(float) - low) / (high - low), 0, 1)
        assert np.isfinite(unit).mean() >= min_valid
        assert np.nanmax(unit) - np.nanmin(unit) < 0.15 + ROUNDING
        assert abs(np.nanmean(unit) - depth_mean) < ROUNDING
        assert radius <= x < width - radius and radius <= y < height - radius
    (x1, y1), (x2, y2) = truth["points"]
    assert np.hypot(x1 - x2, y1 - y2) > 2 * radius


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(80, 260),
    width=st.integers(80, 260),
    holes=st.sampled_from((0.0, 0.1, 0.3)),
    kind=st.sampled_from(("near", "far_single", "far_combined")),
    seed=st.integers(0, 2**20),
)
def test_constraints_and_answer(height, width, holes, kind, seed):
    rec = record(seed % 61, height, width, holes)
    try:
        example = make(rec, seed, kinds={kind: 1.0})
    except Reject:
        assume(False)
    check(rec, example)


@pytest.mark.parametrize("size", [(112, 112), (480, 640), (768, 1024)])
def test_most_rooms_give_every_kind_at_every_size(size):
    kinds = Counter()
    for seed in range(18):
        rec = record(seed, *size, holes=0.02)
        example = make(rec, seed)
        check(rec, example)
        kinds[example.kind] += 1
    assert len(kinds) == 3


@pytest.mark.parametrize("heading", WORDS)
def test_hand_worked_directions(heading):
    """2 is 100 px to the right of 1 and 0.5 farther away; the camera is at 1."""
    view = position.View(((50, 50), (150, 50)), (0.2, 0.7), 1, heading)
    expected = {
        "away": "Right-Front",
        "towards": "Left-Back",
        "left": "Right-Back",
        "right": "Left-Front",
    }
    assert view.direction(plane=20, depth=0.25) == expected[heading]
    beside = {"away": "Right", "towards": "Left", "left": "Back", "right": "Front"}
    assert view.direction(plane=20, depth=0.6) == beside[heading]
    farther = {"away": "Front", "towards": "Back", "left": "Right", "right": "Left"}
    assert view.direction(plane=120, depth=0.25) == farther[heading]
    assert view.direction(plane=120, depth=0.6) == ""


def test_letters_headings_and_cameras_are_even():
    rec, draws = record(6, 64, 64), 5000
    examples = [make(rec, seed) for seed in range(draws)]
    assert_even(Counter(e.answer for e in examples), draws, 4, 0.2)
    assert_even(Counter(e.truth["heading"] for e in examples), draws, 4, 0.2)
    assert_even(Counter(e.truth["camera"] for e in examples), draws, 2, 0.15)
    assert_even(Counter(e.kind for e in examples), draws, 3, 0.2)


def test_shares_of_headings_are_settings():
    released = {"left": 0.3, "right": 0.3, "towards": 0.3, "away": 0.1}
    rec, draws = record(6), 1000
    got = Counter(make(rec, seed, headings=released).truth["heading"] for seed in range(draws))
    for heading, fraction in released.items():
        assert abs(got[heading] / draws - fraction) < 0.05


@pytest.mark.parametrize("kind", ["near", "far_single", "far_combined"])
def test_pairs_are_drawn_evenly(kind):
    low = np.array([0.0, 0.1, 0.1, 0.2, 0.35, 0.5, 0.9])
    high = low + 0.05
    x = np.array([20, 400, 30, 700, 100, 390, 60])
    y = np.array([20, 30, 35, 200, 45, 400, 500])
    found = Regions(np.zeros((768, 900), np.float32), 3, x, y, low, high)
    valid = set()
    for i, j in permutations(range(7), 2):
        wide = abs(x[i] - x[j]) > 150
        gap = max(low[i] - high[j], low[j] - high[i])
        alike = max(high[i], high[j]) - min(low[i], low[j]) <= 0.25
        kinds = {
            "near": alike and wide and abs(y[i] - y[j]) < 30,
            "far_single": gap > 0.25 and not wide,
            "far_combined": gap > 0.25 and wide,
        }
        if kinds[kind] and np.hypot(x[i] - x[j], y[i] - y[j]) > 40:
            valid.add((i, j))
    assert len(valid) >= 2
    draws, rng = 150 * len(valid), np.random.default_rng(0)
    pairs = [
        position._uniform(found, rng, kind, position.PositionSettings(), 40) for _ in range(draws)
    ]
    counts = Counter((int(i), int(j)) for i, j in pairs)
    assert set(counts) == valid
    assert_even(counts, draws, len(valid), 0.35)


def test_a_kind_without_a_pair_gives_way_to_another():
    two = np.full((112, 112), 2.0, np.float32)
    two[:, 56:] = 4  # far on the right: every pair at like depth is in one half
    kinds = {make(record(0, depth=two), seed).kind for seed in range(30)}
    assert kinds <= {"near", "far_single", "far_combined"} and "far_combined" in kinds


def test_rejections():
    with pytest.raises(Reject, match="no pair"):
        make(record(0, 12, 12), 0)
    two = np.full((112, 20), 2.0, np.float32)
    two[56:] = 4
    narrow = record(0, depth=two, image=record(0).image[:, :20])  # no room for two side by side
    with pytest.raises(Reject, match="no pair"):
        make(narrow, 0, kinds={"far_combined": 1.0})
    assert make(narrow, 0).kind == "far_single"
    with pytest.raises(Reject, match="without valid"):
        make(record(0, depth=np.full((112, 112), np.nan, np.float32)), 0)


def released_pair(rec, far: bool) -> list[tuple[int, int]] | None:
    """The first pair [x, y] from the centre outwards, window by window and pixel by pixel."""
    height, width = rec.depth.shape
    unit = (rec.depth - rec.depth.min()) / (rec.depth.max() - rec.depth.min())
    windows = []
    for y in range(3, height - 3):
        for x in range(3, width - 3):
            window = unit[y - 3 : y + 4, x - 3 : x + 4]
            inside = abs(x - width // 2) <= 0.45 * width and abs(y - height // 2) <= 0.45 * height
            if inside and window.max() - window.min() < 0.15:
                distance = np.hypot(x - width // 2, y - height // 2)
                windows.append((distance, y, x, window.min(), window.max()))
    windows.sort(key=lambda w: w[0])
    for i, (_, y1, x1, min1, max1) in enumerate(windows[:256]):
        for _, y2, x2, min2, max2 in windows[i + 1 :]:
            if far:
                fine = max(min1, min2) - min(max1, max2) > 0.25
                fine = fine and abs(x1 - x2) <= 150 * min(height, width) / 768
            else:
                fine = max(max1, max2) - min(min1, min2) <= 0.25 and abs(y1 - y2) < 4
                fine = fine and abs(x1 - x2) > min(height, width) / 8
            fine = fine and max(abs(x1 - x2), abs(y1 - y2)) > 6
            apart = np.hypot(x1 - x2, y1 - y2) > min(height, width) / 8
            if fine and apart:
                return [(x1, y1), (x2, y2)]
    return None


@pytest.mark.parametrize("kind", ["near", "far_single"])
def test_the_released_choice_is_the_pair_nearest_the_centre(kind: str):
    found = 0
    for seed in range(4):
        rec = record(seed, 64, 88)
        wanted = released_pair(rec, far=kind == "far_single")
        if wanted is None:
            continue
        example = make(rec, seed, kinds={kind: 1.0}, choice="released", min_marker=2.0)
        assert sorted(map(tuple, example.truth["points"])) == sorted(wanted)
        assert example.truth["kind"] == kind
        found += 1
    assert found > 1


def test_released_depths_are_normalised_by_the_extremes():
    rec = record(3, 64, 88)
    rec.depth[0, 0] = 100.0
    depths = make(rec, 3, kinds={"near": 1.0}, choice="released").truth["depths"]
    assert max(depths) < 0.1


def test_chance_is_one_in_the_directions_that_the_text_leaves():
    """Heading and tail tell the axis of a single direction."""
    rec = record(2)
    directions: dict[tuple[str, bool, bool], dict[str, float]] = {}
    for seed in range(400):
        example = make(rec, seed)
        options = dict(re.findall(r" ([A-D])\. ([A-Za-z-]+)", example.question))
        told = (
            example.truth["heading"],
            "ignore the height difference" in example.question,
            "-" in options["A"],
        )
        found = directions.setdefault(told, {})
        found[options[example.answer]] = position.chance(example)
    assert len(directions) == 12
    for found in directions.values():
        assert set(found.values()) == {1 / len(found)}
