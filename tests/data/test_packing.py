"""Packing: no example lost, no row too full, each example laid out as if it were alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.packing import (
    PackedExample,
    RowCapacity,
    assign_rows,
    fill_rows,
)

CAPACITY = RowCapacity(tokens=64, windows=9, responses=20)


@st.composite
def sizes(draw) -> list[RowCapacity]:
    """Up to forty examples, each within `CAPACITY`."""
    found = []
    for _ in range(draw(st.integers(0, 40))):
        response = draw(st.integers(1, CAPACITY.responses))
        prompt = draw(st.integers(1, CAPACITY.tokens - response))
        found.append(
            RowCapacity(prompt + response, draw(st.integers(0, CAPACITY.windows)), response)
        )
    return found


def taken(sizes: list[RowCapacity], row: list[int]) -> tuple[int, ...]:
    sums = [(sizes[i].tokens, sizes[i].windows, sizes[i].responses) for i in row]
    return tuple(np.sum(sums, axis=0))


@settings(deadline=None, max_examples=200)
@given(sizes())
def test_each_example_is_in_one_row_that_holds_it(sizes: list[RowCapacity]):
    rows = assign_rows(sizes, CAPACITY)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    limits = CAPACITY.tokens, CAPACITY.windows, CAPACITY.responses
    for row in rows:
        assert all(have <= limit for have, limit in zip(taken(sizes, row), limits, strict=True))
    assert rows == assign_rows(sizes, CAPACITY)


@settings(deadline=None, max_examples=100)
@given(sizes())
def test_no_row_opens_while_another_fits(sizes: list[RowCapacity]):
    """First fit: the example that opens a row fits none of the rows before it."""
    rows = assign_rows(sizes, CAPACITY)
    limits = CAPACITY.tokens, CAPACITY.windows, CAPACITY.responses
    for number, row in enumerate(rows):
        for earlier in rows[:number]:
            both = taken(sizes, [*earlier, row[0]])
            assert any(have > limit for have, limit in zip(both, limits, strict=True))


def test_rows_by_hand():
    """In the order 40, 30, 20, 20, 10 tokens: 40+20, 30+20+10; responses of 15 share no row."""
    tokens = [20, 40, 10, 30, 20]
    assert assign_rows([RowCapacity(n, 1, 2) for n in tokens], CAPACITY) == [[1, 0], [3, 4, 2]]
    assert assign_rows([RowCapacity(20, 1, 15)] * 2, CAPACITY) == [[0], [1]]
    assert assign_rows([RowCapacity(20, 5, 2)] * 2, CAPACITY) == [[0], [1]]


def test_an_example_larger_than_a_row_names_the_settings():
    with pytest.raises(UserError, match="65 tokens, 1 windows .* raise sft.row_tokens"):
        assign_rows([RowCapacity(65, 1, 2)], CAPACITY)


@pytest.fixture(scope="module")
def examples(toy) -> list[PackedExample]:
    """Two images, none, and one; the first windows of each are not full."""
    grids = ([(1, 4, 6), (1, 10, 4)], [], [(1, 8, 12)])
    prompts = [toy.prompt(seed, 6 + seed, grid) for seed, grid in enumerate(grids)]
    return [PackedExample(p, np.arange(3 + i, dtype=np.int32)) for i, p in enumerate(prompts)]


def test_each_example_is_laid_out_as_if_alone(toy, examples):
    capacity, vision = RowCapacity(100, 8, 14), toy.config.vision
    sizes = vision.patch_dim, vision.window_patches, vision.merge_unit
    merged = vision.window_patches // vision.merge_unit
    rows = fill_rows(examples, [[2, 1, 0], []], capacity, *sizes)
    assert (rows.segment[1] == -1).all() and (rows.place[1] == -1).all()
    assert (rows.vision.frame[1] == -1).all()
    vectors = rows.vision.patches[0].reshape(-1, merged, vision.merge_unit * vision.patch_dim)
    vectors, frames = vectors.reshape(-1, vectors.shape[-1]), set()
    place = rows.place[0][rows.place[0] >= 0]
    assert np.array_equal(
        rows.labels[0, : len(place)], np.concatenate([np.arange(n) for n in (5, 4, 3)])
    )
    for segment, example in enumerate([examples[2], examples[1], examples[0]]):
        prompt, response = example.prompt, example.response
        mine = rows.segment[0] == segment
        assert np.array_equal(rows.ids[0, mine], [*prompt.ids, *response])
        position = rows.position[0][:, mine]
        assert np.array_equal(position[:, : len(prompt.ids)], prompt.position)
        after = prompt.next_position + np.arange(len(response))
        assert (position[:, len(prompt.ids) :] == after).all()
        index = rows.image_index[0, mine]
        is_vision = prompt.image_index >= 0
        assert (index[len(prompt.ids) :] == -1).all()
        assert np.array_equal(index[: len(prompt.ids)] >= 0, is_vision)
        alone = prompt.patches.reshape(-1, vectors.shape[-1])[prompt.image_index[is_vision]]
        assert np.array_equal(vectors[index[index >= 0]], alone)
        slots = index[index >= 0]
        found = rows.vision.frame[0].reshape(-1, vision.merge_unit)[slots, 0]
        assert not frames & set(found.tolist())
        frames |= set(found.tolist())
    assert len(frames) == 3
    assert (rows.segment[0] == -1).sum() == capacity.tokens - sum(e.size.tokens for e in examples)
