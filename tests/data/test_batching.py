"""Padding prompts to one shape."""

import numpy as np
import pytest

from spatial_ssrl_jax.data.batching import pad_prompts, prompt_sizes

PATCHES = 20  # of the first prompt


@pytest.fixture(scope="module")
def prompts(toy):
    return [toy.prompt(0, 5, [(1, 2, 10)]), toy.prompt(1, 9)]


def test_sizes_are_counted(prompts):
    assert prompt_sizes(prompts).tolist() == [[12, PATCHES], [9, 0]]
    assert prompt_sizes([]).shape == (0, 2)


def test_padding(prompts):
    batch = pad_prompts(prompts, 16, 256)
    assert batch.ids.shape == (2, 16) and batch.vision.patches.shape == (2, 256, 1176)
    assert batch.vision.patches.dtype == np.uint8
    assert batch.length.tolist() == [len(p.ids) for p in prompts] == [12, 9]
    assert batch.next_position.tolist() == [p.next_position for p in prompts]
    for i, prompt in enumerate(prompts):
        length, patches = len(prompt.ids), len(prompt.frame)
        np.testing.assert_array_equal(batch.ids[i, :length], prompt.ids)
        np.testing.assert_array_equal(batch.position[i, :, :length], prompt.position)
        np.testing.assert_array_equal(batch.image_index[i, :length], prompt.image_index)
        np.testing.assert_array_equal(batch.vision.patches[i, :patches], prompt.patches)
        np.testing.assert_array_equal(batch.vision.frame[i, :patches], prompt.frame)
        np.testing.assert_array_equal(batch.vision.coords[i, :patches], prompt.coords)
        assert (batch.image_index[i, length:] == -1).all()
        assert (batch.vision.frame[i, patches:] == -1).all()
        assert np.asarray(batch.valid[i]).tolist() == [j < length for j in range(16)]


@pytest.mark.parametrize(("tokens", "patches"), [(11, 256), (12, PATCHES - 1)])
def test_a_shape_that_is_too_small_is_refused(prompts, tokens: int, patches: int):
    with pytest.raises(ValueError, match=f"{tokens} tokens and {patches} patches are too few"):
        pad_prompts(prompts, tokens, patches)
