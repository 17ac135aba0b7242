"""Buckets of a batch: trimming undoes widening, and truncates nothing."""

import jax
import numpy as np
import pytest

from spatial_ssrl_jax.data.batching import pad_prompts, trim, widen, windows_of


@pytest.fixture(scope="module")
def prompts(toy):
    return [toy.prompt(0, 6, [(1, 4, 6)]), toy.prompt(1, 5), toy.prompt(2, 7, [(1, 10, 4)] * 2)]


def test_windows_are_counted(prompts):
    batch = pad_prompts(prompts, (64,), (9,))
    assert windows_of(batch).tolist() == [len(p.frame) for p in prompts]


def test_patches_come_in_the_compute_dtype_as_the_model_would_round_them(prompts):
    given, found = (
        pad_prompts(prompts, (64,), (9,), *d).vision.patches for d in ((), ("bfloat16",))
    )
    rounded = jax.jit(lambda x: x.astype("bfloat16"))(given)
    assert found.dtype == "bfloat16" and np.abs(given).max() > 1
    np.testing.assert_array_equal(found, rounded)


def test_trim_undoes_widen_and_picks_rows(prompts):
    tokens, windows = len(prompts[2].ids), len(prompts[2].frame)
    small = pad_prompts(prompts, (tokens,), (windows,))
    wide = widen(small, tokens + 5, windows + 2)
    rows = np.array([2, 0])
    found = trim(wide, rows, tokens, windows)
    expected = pad_prompts([prompts[2], prompts[0]], (tokens,), (windows,))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("tokens", "windows"), [(-1, 0), (0, -1)])
def test_a_bucket_that_is_too_small_is_refused(prompts, tokens, windows):
    batch = pad_prompts(prompts, (64,), (9,))
    with pytest.raises(ValueError, match="too small for the prompts"):
        trim(batch, np.arange(3), len(prompts[2].ids) + tokens, len(prompts[2].frame) + windows)
