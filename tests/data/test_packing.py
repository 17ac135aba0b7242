"""Packing: no group lost, no row too full, each group laid out as if it were alone."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.data.packing import (
    Content,
    Group,
    RowShape,
    assign_rows,
    check_group,
    fill_rows,
)
from spatial_ssrl_jax.data.processor import Prompt

SHAPE = RowShape(Content(tokens=64, patches=36, responses=20), longest_response=20)
# The longer a response may be, the fewer bits say where the first one starts: here at fourths.
ALIGNED = RowShape(SHAPE.capacity, longest_response=2**20)
SHAPES = pytest.mark.parametrize("shape", [SHAPE, ALIGNED], ids=("anywhere", "aligned"))


@st.composite
def contents(draw) -> list[Content]:
    """Up to forty groups, each within the rows' capacity."""
    found, capacity = [], SHAPE.capacity
    for _ in range(draw(st.integers(0, 40))):
        responses = draw(st.integers(1, capacity.responses))
        prompt = draw(st.integers(1, capacity.tokens - responses - (ALIGNED.alignment - 1)))
        patches = draw(st.integers(0, capacity.patches))
        found.append(Content(prompt + responses, patches, responses))
    return found


def is_held(contents: Sequence[Content], shape: RowShape) -> bool:
    """Whether a row holds all of these."""
    needed = np.sum([shape.needed(content) for content in contents], axis=0)
    return bool((needed <= shape.capacity).all())


def test_where_responses_start():
    assert (SHAPE.alignment, ALIGNED.alignment) == (1, 4)
    assert SHAPE.needed(Content(9, 2, 3)) == (9, 2, 3)
    assert ALIGNED.needed(Content(9, 2, 3)) == (12, 2, 3)
    assert ALIGNED.limits.response == 2**20 and ALIGNED.limits.group == 64
    assert replace(ALIGNED, for_splash=False).alignment == 1


def test_groups_may_be_held_to_less_than_a_row():
    """So that a token sees no more than that."""
    half = replace(ALIGNED, largest_group=32)
    assert half.holds(Content(29, 36, 20)) and not half.holds(Content(30, 36, 20))
    assert half.limits.group == 32
    assert assign_rows([Content(29, 1, 2), Content(30, 1, 2)], half) == ([[0]], [1])


def test_an_empty_response_takes_no_place(toy):
    empty = np.array([], np.int32)
    groups = [Group(toy.prompt(0, 3), [empty, np.array([7]), empty, np.array([8])])]
    rows, places = fill_rows(groups, [[0]], RowShape(Content(6, 0, 2), 2), toy.config.vision)
    assert rows.response.tolist() == [[0, 0, 0, 2, 4, 0]]
    assert rows.sample.tolist() == [[0, 1]] and rows.place.tolist() == [[2, 2]]
    assert places.sample.tolist() == [[1, 3]]


@SHAPES
@settings(deadline=None, max_examples=200)
@given(contents())
def test_each_group_is_in_one_row_that_holds_it(shape: RowShape, contents: list[Content]):
    rows, others = assign_rows(contents, shape)
    assert not others and sorted(i for row in rows for i in row) == list(range(len(contents)))
    assert all(is_held([contents[i] for i in row], shape) for row in rows)
    assert rows == assign_rows(contents, shape)[0]


@settings(deadline=None, max_examples=100)
@given(contents(), st.integers(0, 9))
def test_rows_of_a_limit_are_the_first_ones(contents: list[Content], limit: int):
    rows, others = assign_rows(contents, SHAPE, limit)
    assert rows == assign_rows(contents, SHAPE)[0][:limit]
    assert sorted([*others, *(i for row in rows for i in row)]) == list(range(len(contents)))


@SHAPES
@settings(deadline=None, max_examples=100)
@given(contents())
def test_no_row_opens_while_another_fits(shape: RowShape, contents: list[Content]):
    """First fit: the group that opens a row fits none of the rows before it."""
    rows, _ = assign_rows(contents, shape)
    for number, row in enumerate(rows):
        opener = contents[row[0]]
        for earlier in rows[:number]:
            before = [contents[i] for i in earlier if contents[i].tokens >= opener.tokens]
            assert not is_held([*before, opener], shape)


def test_rows_by_hand():
    """In the order 40, 30, 20, 20, 10 tokens: 40+20, 30+20+10.

    Responses of 15 share no row, nor do images of 20 patches, nor 30 tokens each before which up to
    three may be free.
    """
    tokens = [20, 40, 10, 30, 20]
    five = [Content(n, 1, 2) for n in tokens]
    assert assign_rows(five, SHAPE) == ([[1, 0], [3, 4, 2]], [])
    assert assign_rows([Content(20, 1, 15)] * 2, SHAPE) == ([[0], [1]], [])
    assert assign_rows([Content(20, 20, 2)] * 2, SHAPE) == ([[0], [1]], [])
    assert assign_rows([Content(30, 1, 2)] * 2, SHAPE) == ([[0, 1]], [])
    assert assign_rows([Content(30, 1, 2)] * 2, ALIGNED) == ([[0], [1]], [])
    assert assign_rows([Content(29, 1, 2)] * 2, ALIGNED) == ([[0, 1]], [])
    assert assign_rows(five, SHAPE, 2) == ([[1, 0], [3, 4, 2]], [])
    assert assign_rows(five, SHAPE, 1) == ([[1, 0]], [3, 4, 2])
    assert assign_rows(five, SHAPE, 0) == ([], [1, 3, 0, 4, 2])
    assert assign_rows([], SHAPE) == ([], [])


@pytest.mark.parametrize(
    ("shape", "content"),
    [
        (SHAPE, Content(65, 1, 2)),
        (SHAPE, Content(20, 37, 2)),
        (SHAPE, Content(30, 1, 21)),
        (ALIGNED, Content(62, 1, 2)),
    ],
)
def test_a_group_larger_than_a_row_has_none(shape: RowShape, content: Content):
    assert not shape.holds(content)
    assert assign_rows([Content(1, 0, 1), content], shape) == ([[0]], [1])
    padding = " and 3 of padding" if shape == ALIGNED else ""
    said = (
        f"has {content.tokens} tokens{padding}, {content.responses} of them in responses, and "
        f"{content.patches} patches, which a row of 64 tokens, 20 response tokens and 36 patches "
        "does not hold: raise row_tokens, row_responses or row_patches, or leave them out"
    )
    with pytest.raises(UserError, match=said):
        check_group(content, shape)
    check_group(Content(61, 36, 20), shape)


@pytest.mark.parametrize(
    ("shape", "segment", "response", "place"),
    [
        (
            RowShape(Content(16, 0, 6), 2),
            [0, 0, 0, 0, 0, 0, 1, 1, 1, *[-1] * 7],
            [0, 0, 0, 1, 1, 2, 0, 0, 1, *[0] * 7],
            [2, 3, 2, 7, -1, -1],
        ),
        (
            RowShape(Content(16, 0, 6), 2**20),
            [0, 0, 0, -1, 0, 0, 0, 1, 1, -1, -1, -1, 1, -1, -1, -1],
            [0, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0],
            [2, 4, 2, 8, -1, -1],
        ),
    ],
    ids=("anywhere", "aligned"),
)
def test_a_row_by_hand(toy, shape: RowShape, segment, response, place):
    """Prompts of three and two words with responses of two, one and one tokens."""
    groups = [
        Group(toy.prompt(0, 2), [np.array([5])]),
        Group(toy.prompt(1, 3), [np.array([7, 8]), np.array([9])]),
    ]
    assert [group.content for group in groups] == [(3, 0, 1), (6, 0, 3)]
    rows, places = fill_rows(groups, [[1, 0], []], shape, toy.config.vision)
    assert rows.segment.tolist() == [segment, [-1] * 16]
    assert rows.response.tolist() == [response, [0] * 16]
    assert rows.place.tolist() == [place, [-1] * 6]
    assert rows.label.tolist() == [[7, 8, 9, 5, 0, 0], [0] * 6]
    assert rows.sample.tolist() == [[0, 0, 1, 2, -1, -1], [-1] * 6]
    assert rows.limits == shape.limits
    there = rows.segment[0] >= 0
    ids = [*groups[1].prompt.ids, 7, 8, 9, *groups[0].prompt.ids, 5]
    assert rows.ids[0, there].tolist() == ids and not rows.ids[0, ~there].any()
    position = [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert rows.position[0][:, there].tolist() == [position] * 3
    assert places.group.tolist() == [[1, 1, 1, 0, -1, -1], [-1] * 6]
    assert places.sample[0, :4].tolist() == [0, 0, 1, 0]
    assert places.token[0, :4].tolist() == [0, 1, 0, 0]
    of_tokens = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    assert places.of_tokens(of_tokens).tolist() == [[5, 6, 7, 1, 0, 0], [0] * 6]
    assert places.of_samples(of_tokens[..., 1]).tolist() == [[6, 6, 8, 2, 0, 0], [0] * 6]


@pytest.fixture(scope="module")
def groups(toy) -> list[Group]:
    """Two images, none, and one."""
    grids = ([(1, 4, 6), (1, 10, 4)], [], [(1, 8, 12)])
    prompts = [toy.prompt(seed, 6 + seed, grid) for seed, grid in enumerate(grids)]
    counts = ([3, 1], [4], [2, 5, 1])
    return [
        Group(prompt, [10 * i + np.arange(n, dtype=np.int32) for i, n in enumerate(lengths)])
        for prompt, lengths in zip(prompts, counts, strict=True)
    ]


@pytest.mark.parametrize("longest", [5, 2**20], ids=("anywhere", "aligned"))
def test_each_group_is_laid_out_as_if_alone(toy, groups, longest: int):
    shape, vision = RowShape(Content(110, 240, 20), longest), toy.config.vision
    rows, places = fill_rows(groups, [[2, 1, 0], []], shape, vision)
    assert (rows.segment[1] == -1).all() and (rows.place[1] == -1).all()
    assert (rows.vision.frame[1] == -1).all()
    assert (places.group[1] == -1).all()
    frames, samples = set(), 0
    for segment, group in enumerate([groups[2], groups[1], groups[0]]):
        of_prompt = (rows.segment[0] == segment) & (rows.response[0] == 0)
        assert_prompt(toy, rows, of_prompt, group.prompt)
        found = frames_of(toy, rows, of_prompt)
        assert not frames & found
        frames |= found
        start = np.flatnonzero((rows.segment[0] == segment) & (rows.response[0] > 0))[0]
        assert start % shape.alignment == 0
        for number, response in enumerate(group.responses):
            mine = (rows.segment[0] == segment) & (rows.response[0] == number + 1)
            assert np.flatnonzero(mine).tolist() == list(range(start, start + len(response)))
            assert np.array_equal(rows.ids[0, mine], response)
            after = group.prompt.next_position + np.arange(len(response))
            assert (rows.position[0][:, mine] == after).all()
            assert (rows.image_index[0, mine] == -1).all()
            own = rows.sample[0] == samples
            before = [np.flatnonzero(of_prompt)[-1], *range(start, start + len(response) - 1)]
            assert rows.place[0, own].tolist() == before
            assert np.array_equal(rows.label[0, own], response)
            start, samples = start + len(response), samples + 1
    assert len(frames) == 3 and samples == rows.sample.max() + 1
    count = sum(group.content.tokens for group in groups)
    assert (rows.segment[0] >= 0).sum() == count
    assert (rows.place[0] >= 0).sum() == sum(group.content.responses for group in groups)


def assert_prompt(toy, rows, mine: np.ndarray, prompt: Prompt) -> None:
    """A prompt is in the first row at some places, and its text points at its own patches."""
    assert np.array_equal(rows.ids[0, mine], prompt.ids)
    assert np.array_equal(rows.position[0][:, mine], prompt.position)
    index, is_vision = rows.image_index[0, mine], prompt.image_index >= 0
    assert np.array_equal(index >= 0, is_vision)
    size = toy.config.vision.merge_unit * toy.config.vision.patch_dim
    vectors, alone = (x.reshape(-1, size) for x in (rows.vision.patches[0], prompt.patches))
    assert np.array_equal(vectors[index[is_vision]], alone[prompt.image_index[is_vision]])
    coords, alone = (
        x.reshape(-1, toy.config.vision.merge_unit, 2)
        for x in (rows.vision.coords[0], prompt.coords)
    )
    assert np.array_equal(coords[index[is_vision]], alone[prompt.image_index[is_vision]])


def frames_of(toy, rows, mine: np.ndarray) -> set[int]:
    """The numbers of a prompt's images in the first row."""
    index = rows.image_index[0, mine]
    frames = rows.vision.frame[0].reshape(-1, toy.config.vision.merge_unit)
    return set(frames[index[index >= 0], 0].tolist())
