"""The sizes of a rollout's decode programs, and which rows continue."""

import numpy as np
import pytest

from spatial_ssrl_jax.rollout.schedule import (
    DecodeShape,
    RolloutUse,
    Schedule,
    Span,
    select_rows,
)


def schedule(prompts=256, group=5, limit=2048, **settings) -> Schedule:
    given = {"kv_block": 256, "check_every": 8, "prompt_tokens": 1216} | settings
    return Schedule.of(prompts, group, limit, **given)


def sizes(made: Schedule) -> list[tuple[int, int, int]]:
    return [(shape.prompts, shape.group, shape.slots) for shape in made.shapes]


def test_there_are_eight_sizes():
    whole = [(256, 5, slots) for slots in (256, 512, 1024, 2048)]
    parts = [(128, 2, 1024), (128, 2, 2048), (64, 1, 2048), (16, 1, 2048)]
    assert sizes(schedule()) == whole + parts


def test_each_size_comes_after_one_with_no_more_slots():
    made = schedule()
    first, *later = made.shapes
    assert [made.shapes.index(made.before(shape)) for shape in later] == [0, 1, 2, 2, 4, 5, 6]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"limit": 256}, [(256, 5, 256)]),
        ({"limit": 100}, [(256, 5, 100)]),
        ({"limit": 300, "group": 1}, [(256, 1, 256), (256, 1, 300), (128, 1, 256), (128, 1, 300),
                                      (64, 1, 300), (16, 1, 300)]),
        ({"limit": 512, "prompts": 1}, [(1, 5, 256), (1, 5, 512), (1, 2, 256), (1, 2, 512),
                                        (1, 1, 512)]),
        ({"limit": 512, "prompts": 24, "shards": 8}, [(24, 5, 256), (24, 5, 512), (16, 2, 256),
                                                      (16, 2, 512), (8, 1, 512)]),
        ({"limit": 512, "whole_groups": True}, [(256, 5, 256), (256, 5, 512), (128, 5, 256),
                                                (128, 5, 512), (64, 5, 512), (16, 5, 512)]),
    ],
)  # fmt: skip
def test_sizes(settings, expected):
    assert sizes(schedule(**settings)) == expected


def test_rows_of_the_next_size():
    live = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]], bool)
    assert DecodeShape(3, 2, 8).holds(live) and not DecodeShape(2, 2, 8).holds(live)
    rows = select_rows(live, DecodeShape(4, 2, 8))
    names = np.array([list("abcd"), list("efgh"), list("ijkl")])
    assert rows.prompt.tolist() == [0, 2, 2, 0]
    assert rows.used.tolist() == [[1, 1], [1, 1], [1, 0], [0, 0]]
    assert rows.of(names)[rows.used].tolist() == ["b", "c", "i", "j", "l"]
    assert not rows.keeps(3) and not rows.keeps(4)


def test_prompts_stay_where_they_are_if_they_can():
    live = np.array([[0, 1, 0], [0, 0, 0], [1, 0, 1]], bool)
    rows = select_rows(live, DecodeShape(3, 2, 8))
    assert rows.keeps(3) and not rows.keeps(4) and rows.used.tolist() == [[1, 0], [0, 0], [1, 1]]
    assert rows.of(np.arange(9).reshape(3, 3))[rows.used].tolist() == [1, 6, 8]


def test_samples_of_whole_groups_keep_their_places():
    """The last one may be greedy."""
    rng, made = np.random.default_rng(0), schedule(12, 5, whole_groups=True)
    for _ in range(200):
        live = rng.random((12, 5)) < 0.2
        for shape in made.shapes:
            if shape.holds(live):
                rows = select_rows(live, shape)
                np.testing.assert_array_equal(
                    rows.sample[rows.used], np.nonzero(rows.used)[1], str(live)
                )
                kept = rows.of(np.arange(60).reshape(12, 5))[rows.used]
                assert sorted(kept) == np.flatnonzero(live).tolist()


def test_no_sample_is_lost():
    """Of random states, whatever the next size."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        live = rng.random((12, 5)) < rng.random()
        fits = [shape for shape in schedule(12, 5).shapes if shape.holds(live)]
        for shape in fits:
            rows = select_rows(live, shape)
            assert rows.used.shape == (shape.prompts, shape.group)
            kept = rows.of(np.arange(60).reshape(12, 5))[rows.used]
            assert sorted(kept) == np.flatnonzero(live).tolist()


def test_the_least_reading_size_that_holds_what_is_left_comes_next():
    made = schedule()
    whole = made.shapes[0]
    live = np.zeros((256, 5), bool)
    live[:64, 0] = True
    assert made.next_shape(whole, ~live, 256) == DecodeShape(256, 5, 512)
    assert made.next_shape(whole, live, 256) == DecodeShape(64, 1, 2048)
    live[:3, 1] = True
    assert made.next_shape(made.shapes[1], live, 512) == DecodeShape(128, 2, 1024)
    # A wider size is not taken while the slots last.
    assert made.next_shape(whole, ~live, 64) == whole


def test_what_no_small_size_holds_has_more_rows_again():
    """At the end of its slots, where samples of one prompt took rows of their own."""
    made = schedule()
    live = np.ones((128, 2), bool)
    assert made.next_shape(DecodeShape(128, 2, 1024), live, 1024) == DecodeShape(128, 2, 2048)
    live = np.ones((64, 1), bool)
    shapes = (DecodeShape(64, 1, 8), DecodeShape(128, 2, 16))
    made = Schedule(shapes, 8, 8, 10)
    assert made.next_shape(shapes[0], live, 8) == shapes[1]
    rows = select_rows(live, shapes[1])
    assert rows.used.sum() == 64 and rows.used.shape == (128, 2)


def test_simulated_spans():
    made = schedule(8, 2, 64, kv_block=16, check_every=4, prompt_tokens=10)
    length = np.full((8, 2), 7)
    length[3, 1] = 50
    expected = [
        ((8, 2, 16), 0, 8), ((1, 1, 64), 8, 52),
    ]  # fmt: skip
    found = made.simulate(length)
    merged = [found[0]]
    for span in found[1:]:
        if span.shape == merged[-1].shape:
            merged[-1] = Span(span.shape, merged[-1].start, span.end)
        else:
            merged.append(span)
    assert [
        ((s.shape.prompts, s.shape.group, s.shape.slots), s.start, s.end) for s in merged
    ] == expected
    use = RolloutUse.of(found, length, np.full(8, 9), 10, 96)
    assert (use.steps, use.tokens, use.rows) == (52, 155, 16 * 8 + 44)
    assert use.columns == 8 * (8 * 10 + 16 * 16) + 44 * (10 + 64)
    assert use.live_columns == 9 * (7 * 7 + 50) + 15 * 28 + 50 * 51 // 2
    assert use.metrics()["prefill_padding_share"] == pytest.approx(1 - 8 * 9 / 96)
    assert (use + use).rows == 2 * use.rows


def test_what_waits_has_room_beside_a_batch():
    """At the limit, in as much memory as a batch needs there."""
    made = schedule(16, prompt_tokens=1824, batches=16)
    assert made.leftovers == DecodeShape(31, 1, 512)
    whole, stopped = DecodeShape(16, 5, 2048).columns(1824), DecodeShape(16, 5, 512).columns(1824)
    row = DecodeShape(1, 1, 2048).columns(1824)
    assert stopped + 31 * row <= whole < stopped + 32 * row
    assert sizes(made) == [
        *((16, 5, slots) for slots in (256, 512, 1024, 2048)),
        (31, 1, 1024), (31, 1, 2048), (8, 1, 2048), (2, 1, 2048),
    ]  # fmt: skip
    made = schedule(16, prompt_tokens=1824, batches=16, shards=4)
    assert made.leftovers == DecodeShape(28, 1, 512)
    shorter = schedule(16, prompt_tokens=960, longest_prompt=1824, batches=16)
    assert shorter.leftovers == DecodeShape(31, 1, 512)
    assert schedule(1, 1, prompt_tokens=9999, batches=16).leftovers is None


@pytest.mark.parametrize(
    "settings", [{"batches": 2}, {"limit": 512}, {"limit": 256}, {"whole_groups": True}]
)
def test_nothing_waits_where_it_gains_nothing(settings):
    """For one other batch, in responses of two blocks, or in groups that stay together."""
    made = schedule(16, prompt_tokens=1824, **({"batches": 16} | settings))
    assert made.leftovers is None
    assert made.shapes == schedule(16, prompt_tokens=1824, **(settings | {"batches": 1})).shapes


def test_leftovers_of_several_batches_are_decoded_together():
    """Those that fit; a batch with more unfinished samples goes on when the others have ended."""
    made = schedule(2, 4, prompt_tokens=0, batches=5)
    assert made.leftovers == DecodeShape(6, 1, 512)
    few, many = np.full((2, 4), 40), np.full((2, 4), 600)
    few[0, :3] = 520, 1000, 530
    spans = made.simulate(few, few, few, many, few)
    tails = [(span.shape, span.start, span.end) for span in spans if span.end > 512]
    whole, rows = DecodeShape(2, 4, 1024), DecodeShape(6, 1, 1024)
    assert [(s, start) for s, start, _ in tails if start == 512] == [
        (rows, 512), (whole, 512), (rows, 512), (rows, 512)
    ]  # fmt: skip
    assert max(end for _, _, end in tails) == 1000
    apart = [schedule(2, 4).simulate(lengths) for lengths in (few, few, few, many, few)]
    assert sum(s.steps for s in spans) < sum(s.steps for one in apart for s in one)
