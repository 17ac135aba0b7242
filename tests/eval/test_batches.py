"""Batches of questions: each question once, similar sizes together, few shapes."""

from pathlib import Path

import numpy as np

from spatial_ssrl_jax.data.processor import PromptSize
from spatial_ssrl_jax.eval.batches import attention_chunk, plan_batches
from spatial_ssrl_jax.qwen_vl.family import read_config


def test_every_question_is_asked_once_in_few_shapes_and_fits():
    rng = np.random.default_rng(0)
    images = np.exp(rng.uniform(np.log(1280), np.log(16_384), 3000)).astype(int)
    sizes = [PromptSize(int(n + rng.integers(40, 400)), 4 * int(n)) for n in images]
    batches = plan_batches(sizes, shards=4, max_rows=16)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(3000))
    for batch in batches:
        assert len(batch.indices) <= batch.size and batch.size % 4 == 0
        assert batch.size // 4 * batch.shape.tokens <= 32768 or batch.size == 4
        for i in batch.indices:
            assert sizes[i].tokens <= batch.shape.tokens
            assert sizes[i].patches <= batch.shape.patches
    assert len({(batch.shape, batch.size) for batch in batches}) <= 14
    padded = sum(batch.size * batch.shape.tokens for batch in batches)
    assert padded < 1.4 * sum(size.tokens for size in sizes)
    sizes = [batch.shape.patches for batch in batches]
    assert sizes == sorted(sizes, reverse=True)


def test_what_would_not_fill_a_batch_joins_the_next_larger():
    sizes = [
        PromptSize(5000, 19_200),
        PromptSize(1000, 3840),
        PromptSize(100, 0),
        *[PromptSize(90, 0)] * 5,
    ]
    first, rest = plan_batches(sizes, shards=1, max_rows=16)
    assert first.size * first.shape.tokens <= 32768 < (first.size + 1) * first.shape.tokens
    assert first.indices == tuple(range(first.size)) and first.shape.patches >= 19_200
    assert rest.indices == tuple(range(first.size, 8)) and rest.shape == PromptSize(128, 0)


def test_scores_against_a_long_video_fit(shared: Path):
    """In GiB of float32 scores: of a video of 128 frames, and of sixteen images."""
    config = read_config(shared / "qwen2_5_vl" / "3b")
    heads = config.vision.num_heads
    for shape, rows in ((PromptSize(50_000, 196_608), 1), (PromptSize(1536, 8192), 16)):
        queries = attention_chunk(config, shape, rows, max_chunk=1024)
        patches = shape.patches
        assert 2**29 < 4 * queries * rows * heads * patches <= 2**30
    assert attention_chunk(config, PromptSize(128, 512), 1, max_chunk=1024) == 1024


def test_questions_about_one_video_are_together():
    names = [f"{i % 3}.mp4" for i in range(12)]
    batches = plan_batches([PromptSize(900, 3200)] * 12, shards=1, max_rows=4, groups=names)
    assert [{names[i] for i in batch.indices} for batch in batches] == [
        {"0.mp4"},
        {"1.mp4"},
        {"2.mp4"},
    ]
    assert [batch.size for batch in batches] == [4, 4, 4]
