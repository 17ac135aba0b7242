"""Mixtures: how they are written, and what a task draws from them."""

import pickle
from dataclasses import replace

import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config import Config
from spatial_ssrl_jax.data.sources import OPENERS, open_source
from spatial_ssrl_jax.data.sources.mixture import SpecPart, split_spec
from spatial_ssrl_jax.data.split import split_records
from spatial_ssrl_jax.data.task_sources import (
    check_served,
    source_shares,
    task_sources,
    tasks_for,
    unusable,
)
from spatial_ssrl_jax.tasks import TASKS_BY_NAME
from tests.data.test_sources import save_image


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("nyu:/a", [("nyu:/a", 1)]),
        ("nyu:/a+folder:/b", [("nyu:/a", 1), ("folder:/b", 1)]),
        ("2*nyu:/a + 0.5*folder:/b", [("nyu:/a", 2), ("folder:/b", 0.5)]),
        ("scenes+3*scenes:9", [("scenes", 1), ("scenes:9", 3)]),
        ("folder:/c++/a+b", [("folder:/c++/a+b", 1)]),
        ("arrayrecord:/x/*-of-*+2*scenes", [("arrayrecord:/x/*-of-*", 1), ("scenes", 2)]),
        ("flip@folder:/a", [("folder:/a", 1, ("flip",))]),
        (
            "shuffle,flip,crop@folder:A+depth,position@2*diode:D + position@megadepth:M",
            [
                ("folder:A", 1, ("shuffle", "flip", "crop")),
                ("diode:D", 2, ("depth", "position")),
                ("megadepth:M", 1, ("position",)),
            ],
        ),
        (
            "crop@tfds:coco/2017:train[:10%]+depth@0.5*scenes",
            [("tfds:coco/2017:train[:10%]", 1, ("crop",)), ("scenes", 0.5, ("depth",))],
        ),
        (
            "crop@arrayrecord:/x/[0-9]*-of-*+flip@folder:/[0-9]",
            [("arrayrecord:/x/[0-9]*-of-*", 1, ("crop",)), ("folder:/[0-9]", 1, ("flip",))],
        ),
        ("folder:/my+folder", [("folder:/my+folder", 1)]),
        ("rgbd:/data/rgbd+nyu", [("rgbd:/data/rgbd+nyu", 1)]),
        (
            "scenes + flip , crop @ 2 * folder:B",
            [("scenes", 1), ("folder:B", 2, ("flip", "crop"))],
        ),
        ("folder:/me@home/a+b@[c]", [("folder:/me@home/a+b@[c]", 1)]),
        ("folder:/a@b+flip@folder:/c+d", [("folder:/a@b", 1), ("folder:/c+d", 1, ("flip",))]),
    ],
)
def test_the_written_format(spec: str, parts: list):
    assert split_spec(spec, list(OPENERS)) == [SpecPart(*part) for part in parts]


@pytest.mark.parametrize("spec", ["2*depth@nyu:A", "folder:A+2*depth@nyu:A"])
def test_a_weight_before_the_tasks_is_explained(spec: str):
    with pytest.raises(UserError, match=r"in '2\*depth@nyu:A' the weight comes first"):
        open_source(spec)


def test_an_unknown_task_is_named():
    with pytest.raises(UserError, match="there is no task 'flop'; did you mean 'flip'"):
        open_source("crop,flop@scenes")


def test_a_task_is_not_asked_of_a_source_without_depth(tmp_path):
    save_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=rf"depth is asked of folder:{tmp_path}, which has no dep"):
        open_source(f"depth@folder:{tmp_path}+scenes")


def test_a_task_draws_from_the_sources_that_serve_it(tmp_path):
    save_image(tmp_path / "a.png")
    spec = f"shuffle,crop@folder:{tmp_path}+depth@3*scenes:4+depth,position@scenes:5"
    source = open_source(spec)
    settings = tasks_for(source, Config("x").task_settings)
    shares = {
        name: source_shares(task_sources(source, range(10), task, settings[task]))
        for name, task in TASKS_BY_NAME.items()
    }
    assert shares == {
        "shuffle": {f"folder:{tmp_path}": 1.0},
        "flip": {},
        "crop": {f"folder:{tmp_path}": 1.0},
        "depth": {"scenes:4": 0.75, "scenes:5": 0.25},
        "position": {"scenes:5": 1.0},
    }
    assert unusable(source, TASKS_BY_NAME["flip"]) == f"no source in {spec} is for the task flip"
    check_served(source, settings)
    depth = TASKS_BY_NAME["depth"]
    few = {**settings, depth: replace(settings[depth], weight=0.0)}
    with pytest.raises(UserError, match="scenes:4 in .* serves none of the tasks that train"):
        check_served(source, few)


def test_a_weight_of_zero_is_refused():
    with pytest.raises(UserError, match=r"weight of '0\*scenes' must be above 0"):
        open_source("scenes+0*scenes")


@pytest.fixture
def mixture(tmp_path):
    for name in "abcd":
        save_image(tmp_path / f"{name}.png")
    return open_source(f"2*folder:{tmp_path}+scenes:10")


def test_records_are_concatenated(mixture):
    again = pickle.loads(pickle.dumps(mixture))
    assert len(again) == 14 and again.has_depth
    assert [again.name(i) for i in (0, 3, 4, 13)] == [
        "a.png",
        "d.png",
        "scene-000000",
        "scene-000009",
    ]
    assert again[1].name == "b.png" and again[4].depth is not None
    with pytest.raises(IndexError):
        again.name(14)


def test_depth_tasks_draw_from_parts_with_depth(mixture):
    pool = range(14)
    found = {
        name: [
            (s.weight, len(s.indices)) for s in task_sources(mixture, pool, task, task.settings())
        ]
        for name, task in TASKS_BY_NAME.items()
    }
    assert found["shuffle"] == found["crop"] == [(2, 4), (1, 10)]
    assert found["depth"] == found["position"] == [(1, 10)]
    kept = task_sources(mixture, [0, 2, 5], TASKS_BY_NAME["flip"], None)
    assert [s.indices for s in kept] == [[0, 2], [1]]


def test_a_part_is_split_as_alone(mixture):
    split = split_records(mixture, 0.4)
    assert sorted(split.train + split.heldout) == list(range(14))
    for part in mixture.parts:
        alone = split_records(part.source, 0.4).heldout
        assert alone and [i + part.start for i in alone] == [
            i for i in split.heldout if i in part.indices
        ]
