"""Shapes of rows: those of a config, and the one that a step's groups are packed into."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import (
    Config,
    DataSettings,
    GrpoSettings,
    RolloutSettings,
    SftSettings,
    StageSettings,
)
from spatial_ssrl_jax.data.packing import Content, RowShape
from spatial_ssrl_jax.qwen_vl.compute import XLA, AttentionKernel
from spatial_ssrl_jax.rl import row_shapes as module
from spatial_ssrl_jax.rl.row_shapes import (
    MicroBatch,
    pack_micro_batches,
    row_cost,
    row_shapes,
    shapes_for,
)
from spatial_ssrl_jax.rl.stages import GrpoStage, SftStage
from tests.rl.conftest import CONFIG

BASE = replace(
    Config("x"),
    data=DataSettings(prompt_buckets=(64, 128), patch_buckets=(256, 512)),
    rollout=RolloutSettings(max_new_tokens=64),
)
NAMES = ("row_tokens", "row_patches", "row_responses")
ROWS = {"micro_batch_rows": 2}


def shapes_of(settings: StageSettings, config: Config = BASE) -> list[Content]:
    """What the shapes of a stage's rows hold."""
    kind = GrpoStage if isinstance(settings, GrpoSettings) else SftStage
    shapes = row_shapes(config, kind("stage", settings, 0, 0))
    limit = config.rollout.max_new_tokens
    assert all(shape.longest_response == limit for shape in shapes)
    return [shape.capacity for shape in shapes]


def given_sizes(*sizes: tuple[int, int, int]) -> SftSettings:
    """SFT whose rows have these tokens, patches and response tokens."""
    return SftSettings(**dict(zip(NAMES, zip(*sizes, strict=True), strict=True)))


def test_many_groups_have_rows_that_differ_in_what_they_have_room_for():
    """With four samples each, the largest group has 128 + 4 x 64 tokens."""
    found = shapes_of(GrpoSettings(prompts=96, minibatches_per_rollout=2, group_size=4, **ROWS))
    assert len(found) == 3 and {size.tokens for size in found} == {384}
    assert [size.patches for size in found] == sorted((s.patches for s in found), reverse=True)
    assert [size.responses for size in found] == sorted(size.responses for size in found)
    assert len({size.patches for size in found}) == 3 and found[-1].responses >= 4 * 64
    assert all(size.responses % 64 == 0 for size in found)
    assert found[0].patches / 384 > 0.5 * 512 / 128  # images as dense as in the largest prompt


def test_few_groups_have_rows_of_several_lengths():
    """Each may be left in the shortest one that holds it."""
    found = shapes_of(GrpoSettings(prompts=96, minibatches_per_rollout=4, group_size=4, **ROWS))
    tokens = [size.tokens for size in found]
    assert len(found) == 3 and tokens == sorted(set(tokens)) and tokens[-1] == 384
    assert all(size.responses <= size.tokens for size in found)


def test_shapes_that_are_given():
    """The last one is as large as the largest group at least."""
    assert shapes_of(given_sizes((192, 256, 64), (192, 576, 100))) == [
        (192, 256, 64),
        (192, 576, 100),
    ]
    assert shapes_of(given_sizes((200, 256, 64), (220, 192, 9))) == [
        (200, 256, 64),
        (220, 512, 64),
    ]
    assert shapes_of(given_sizes((100, 0, 1), (90, 576, 100))) == [(100, 0, 1), (192, 576, 100)]
    assert shapes_of(given_sizes((192, 512, 64))) == [(192, 512, 64)]


def test_of_doubles_the_last_stays():
    whole = (192, 512, 64)
    assert shapes_of(given_sizes(whole, whole, whole)) == [whole]
    double = given_sizes((192, 384, 64), (192, 384, 64), (192, 576, 64))
    assert shapes_of(double) == [(192, 384, 64), (192, 576, 64)]
    assert shapes_of(given_sizes(whole, (192, 384, 64), (9, 576, 9))) == [
        whole,
        (192, 384, 64),
        (192, 576, 64),
    ]
    assert shapes_of(given_sizes(whole, (192, 384, 64), (9, 256, 9))) == [(192, 384, 64), whole]


SIZES = st.tuples(st.integers(1, 40_000), st.integers(0, 200), st.integers(1, 20_000))


@settings(deadline=None, max_examples=300)
@given(
    prompt=st.integers(1, 20_000),
    patches=st.integers(0, 9999),
    group=st.integers(1, 8),
    limit=st.sampled_from((1, 16, 256, 2048)),
    groups=st.sampled_from((0.5, 2, 30)),
    more=st.integers(-600, 600),
    sizes=st.lists(SIZES, max_size=3),
)
def test_the_last_shape_holds_the_largest_group(prompt, patches, group, limit, groups, more, sizes):
    """Also where it is given with about the tokens of that, without padding before responses."""
    largest = Content(prompt + group * limit, patches, group * limit)
    about = Content(max(largest.tokens + more, 1), patches, largest.responses)
    for given_ones in ([], [Content(*size) for size in sizes], [*map(Content._make, sizes), about]):
        *others, last = shapes_for(largest, limit, groups, given_ones)
        assert last.holds(largest) and last not in others and len(set(others)) == len(others)
        assert {shape.capacity for shape in others} <= set(given_ones) or not given_ones


@pytest.mark.parametrize(("prompt", "limit", "needed"), [(128, 64, 192), (10_240, 2048, 12_415)])
def test_rows_of_one_size_hold_the_largest_group(prompt: int, limit: int, needed: int):
    """Where responses start at multiples of 128, up to 127 tokens before them are padding."""
    config = replace(
        BASE,
        data=DataSettings(prompt_buckets=(prompt,), patch_buckets=(8,)),
        rollout=RolloutSettings(max_new_tokens=limit),
    )
    for small in ((needed - 1, 8, limit), (needed, 7, limit), (needed, 8, limit - 1)):
        said = (
            rf"stage\.row_tokens, row_patches and row_responses name one size .*, of {small[0]}, "
            rf"{small[1]}, {small[2]}, which does not hold the largest prompt, of {prompt} tokens "
            rf"and 8 patches, with 1 x {limit} response tokens: raise them to {needed}, 8, {limit},"
        )
        with pytest.raises(UserError, match=said):
            shapes_of(given_sizes(small), config)
    whole = (needed, 8, limit)
    assert shapes_of(given_sizes(whole), config) == [whole]
    assert shapes_of(given_sizes((9, 9, 9), whole), config) == [(9, 9, 9), whole]


def test_a_rows_cost_is_that_of_its_matmuls():
    """Two layers of width 32 each: q and o, k and v, the MLPs; and the head."""
    text = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    vision = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    head = 32 * CONFIG.text.vocab_size
    patches = 192
    shape = RowShape(Content(100, patches, 20), 8)
    assert row_cost(shape, CONFIG) == 100 * text + patches * vision + 20 * head


FEW, MANY = (RowShape(Content(64, 2, responses), 40) for responses in (16, 64))
SMALL = Content(30, 1, 6)


def pack(contents: Sequence[Content], rows: int) -> list[MicroBatch]:
    return pack_micro_batches(contents, (FEW, MANY), rows, CONFIG)


@pytest.mark.parametrize(
    ("contents", "rows", "expected"),
    [
        ([SMALL] * 4, 1, [(FEW, (0, 1)), (FEW, (2, 3))]),
        ([SMALL] * 3, 2, [(FEW, (0, 1), (2,))]),
        ([SMALL] * 3, 3, [(FEW, (0, 1), (2,), ())]),
        # Two rows of many responses cost less than four of few.
        ([Content(30, 1, 15)] * 4, 1, [(MANY, (0, 1)), (MANY, (2, 3))]),
        ([Content(30, 1, 15)] * 4, 4, [(FEW, (0,), (1,), (2,), (3,))]),
        # The second group fits the last shape alone.
        (
            [SMALL, Content(50, 1, 40), SMALL, SMALL],
            1,
            [(FEW, (0, 2)), (FEW, (3,)), (MANY, (1,))],
        ),
        ([SMALL, Content(50, 1, 40), SMALL, SMALL], 2, [(FEW, (0, 2), (3,)), (MANY, (1,), ())]),
        ([SMALL, Content(50, 1, 40)], 2, [(MANY, (1,), (0,))]),
        ([Content(50, 1, 40)], 1, [(MANY, (0,))]),
        ([], 2, [(MANY, (), ())]),
    ],
)
def test_groups_go_where_they_cost_least(contents, rows, expected):
    found = pack(contents, rows)
    assert found == [MicroBatch(shape, tuple(members)) for shape, *members in expected]
    assert [part.padded_tokens for part in found] == [rows * 64] * len(found)


def test_a_few_groups_that_are_left_go_where_they_cost_less():
    """Five groups take three of the long rows, which would be four, or six of the short ones."""
    short, long = (RowShape(Content(*size), 8) for size in ((36, 1, 8), (64, 2, 16)))
    found = pack_micro_batches([SMALL] * 5, (short, long), 2, CONFIG)
    assert found == [MicroBatch(short, ((4,), ())), MicroBatch(long, ((0, 1), (2, 3)))]


def test_a_group_larger_than_the_last_shape_is_refused():
    with pytest.raises(UserError, match="has 65 tokens, .*raise row_tokens"):
        pack([SMALL, Content(65, 1, 6)], 1)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        # One has more rows, the other gets empty ones.
        (
            [[Content(60, 1, 6)] * 3, [SMALL]],
            [
                [(FEW, (0,), (1,)), (FEW, (2,), ())],
                [(FEW, (0,), ()), (FEW, (), ())],
            ],
        ),
        # Alone, the second would take rows of few responses.
        (
            [[Content(30, 1, 15)] * 8, [SMALL] * 2],
            [
                [(MANY, (0, 1), (2, 3)), (MANY, (4, 5), (6, 7))],
                [(MANY, (0, 1), ()), (MANY, (), ())],
            ],
        ),
        # One has what only the last shape holds.
        (
            [[Content(50, 1, 40)], [SMALL] * 4],
            [[(MANY, (0,), ())], [(MANY, (0, 1), (2, 3))]],
        ),
        (
            [[Content(50, 1, 40), *[SMALL] * 4], [SMALL] * 4],
            [
                [(FEW, (1, 2), (3, 4)), (MANY, (0,), ())],
                [(FEW, (0, 1), (2, 3)), (MANY, (), ())],
            ],
        ),
        ([[], [Content(50, 1, 40)]], [[(MANY, (), ())], [(MANY, (0,), ())]]),
        ([[], []], [[(MANY, (), ())], [(MANY, (), ())]]),
    ],
)
def test_processes_agree_on_shapes_and_rows(monkeypatch: pytest.MonkeyPatch, parts, expected):
    """Four rows are two on each process; here they are threads that wait for one another."""
    shared: dict[int, np.ndarray] = {}
    barrier = threading.Barrier(2, timeout=60)

    def gather(own: np.ndarray) -> np.ndarray:
        shared[threading.get_ident()] = own
        barrier.wait()
        found = np.concatenate([*shared.values()])
        barrier.wait()
        return found

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(module, "all_gather", gather)
    with ThreadPoolExecutor(2) as threads:
        found = [*threads.map(lambda contents: pack(contents, 4), parts)]
    for mine, rows in zip(found, expected, strict=True):
        assert mine == [MicroBatch(shape, tuple(members)) for shape, *members in rows]


def test_rows_too_long_for_splash_are_refused():
    """It knows a query by 32 bits; other kernels take any row, and need no padding in groups."""
    config = replace(
        Config("x"),
        data=DataSettings(prompt_buckets=(4096,), patch_buckets=(4096,)),
        grpo=GrpoSettings(group_size=32, prompts=32, minibatches_per_rollout=1),
        rollout=RolloutSettings(max_new_tokens=2048),
    )
    stage = GrpoStage("grpo", config.grpo, 0, 0)
    with pytest.raises(UserError, match="above the 65536 of model.attention=splash: lower .*xla"):
        row_shapes(config, stage, AttentionKernel("splash"))
    shapes = row_shapes(config, stage, XLA)
    assert shapes[-1].capacity.tokens == 4096 + 32 * 2048 and {s.alignment for s in shapes} == {1}
