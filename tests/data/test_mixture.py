"""Mixtures: how they are written, and what a task draws from them."""

import pickle

import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.items import task_sources
from spatial_ssrl_jax.data.sources import OPENERS, open_source
from spatial_ssrl_jax.data.sources.mixture import split_spec
from spatial_ssrl_jax.data.split import split_records
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
    ],
)
def test_the_written_format(spec: str, parts: list):
    assert split_spec(spec, list(OPENERS)) == parts


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
