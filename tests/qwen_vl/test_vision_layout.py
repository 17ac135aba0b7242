"""Windows, merged tokens and M-RoPE positions, by their properties, by hand and by Transformers."""

import numpy as np
import pytest

from spatial_ssrl_jax.qwen_vl.inputs import merged_tokens
from spatial_ssrl_jax.qwen_vl.qwen2_5 import lay_out_patches, mrope_positions

CASES = {
    "one token": [(1, 2, 2)],
    "whole windows": [(1, 16, 24)],
    "partial windows": [(1, 26, 18)],
    "strips": [(1, 2, 50), (1, 36, 2)],
    "video": [(3, 10, 12)],
    "mixed": [(1, 10, 6), (2, 8, 8), (1, 2, 2), (4, 18, 4)],
}


@pytest.fixture(params=CASES)
def grids(request):
    return CASES[request.param]


@pytest.fixture
def config(toy):
    return toy.config.vision


def processor_order(grids):
    """(image or frame, row, column) of each patch as the processor lists them, by plain loops."""
    listed, first = [], 0
    for t, h, w in grids:
        for frame in range(first, first + t):
            for row in range(0, h, 2):
                for column in range(0, w, 2):
                    listed += [(frame, row + i, column + j) for i in (0, 1) for j in (0, 1)]
        first += t
    return np.array(listed)


def test_every_patch_is_there_once_with_its_coordinates(config, grids):
    layout, listed = lay_out_patches(config, grids), processor_order(grids)
    np.testing.assert_array_equal(np.sort(layout.source), np.arange(len(listed)))
    found = np.concatenate((layout.frame[:, None], layout.coords), axis=1)
    np.testing.assert_array_equal(found, listed[layout.source])


def test_the_patches_of_a_window_are_neighbours(config, grids):
    """A window is 8 by 8 patches of one frame."""
    layout = lay_out_patches(config, grids)
    windows = np.concatenate((layout.frame[:, None], layout.coords // 8), axis=1)
    changes = (windows[1:] != windows[:-1]).any(axis=1).sum()
    assert changes + 1 == len(np.unique(windows, axis=0))


def test_merged_tokens_in_reading_order(config, grids):
    """Merged slot `merged[i]` holds the processor's patches 4i to 4i+3, in order."""
    layout = lay_out_patches(config, grids)
    total = sum(merged_tokens(config, grid) for grid in grids)
    assert total == sum(t * h * w for t, h, w in grids) // 4
    quads = layout.source.reshape(-1, 4)[layout.merged]
    np.testing.assert_array_equal(quads, np.arange(4 * total).reshape(-1, 4))


def test_same_windows_as_transformers(config, grids):
    torch = pytest.importorskip("torch", reason="compares with Transformers, which needs torch")
    from transformers.vision_utils import get_vision_window_index

    order, ends = get_vision_window_index(torch.tensor(grids), 2, 112, 14)
    window = np.repeat(np.arange(len(ends) - 1), np.diff(ends.numpy()) // 4)
    expected = np.empty(len(order), int)
    expected[order.numpy()] = window
    layout = lay_out_patches(config, grids)
    places = np.concatenate((layout.frame[:, None], layout.coords // 8), axis=1)[::4]
    _, found = np.unique(places[layout.merged], axis=0, return_inverse=True)
    same = lambda x: x[:, None] == x  # noqa: E731
    np.testing.assert_array_equal(same(found.ravel()), same(expected))
    np.testing.assert_array_equal(np.argsort(layout.merged), order.numpy())


def test_no_images(config):
    layout = lay_out_patches(config, [])
    assert layout.source.shape == layout.frame.shape == layout.merged.shape == (0,)
    assert layout.coords.shape == (0, 2)


def test_positions_of_an_image_by_hand(config):
    """Two words, an image of 2x3 tokens, two words: text continues after the longer side."""
    is_vision = np.array([0, 0, 1, 1, 1, 1, 1, 1, 0, 0], bool)
    found = mrope_positions(config, is_vision, [(1, 4, 6)], [None])
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_positions_of_a_video_by_hand(config):
    """Frames 0.7 s apart at 2 positions a second: 0, 1.4, 2.8, rounded down."""
    is_vision = np.array([0] + [1] * 6 + [0], bool)
    found = mrope_positions(config, is_vision, [(3, 2, 4)], [0.7])
    assert found.tolist() == [
        [0, 1, 1, 2, 2, 3, 3, 3],
        [0, 1, 1, 1, 1, 1, 1, 3],
        [0, 1, 2, 1, 2, 1, 2, 3],
    ]


def test_positions_of_text_count_up(config):
    found = mrope_positions(config, np.zeros(5, bool), [], [])
    assert found.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_fewer_grids_than_images_is_an_error(config):
    with pytest.raises((StopIteration, ValueError)):
        mrope_positions(config, np.array([1, 1, 0, 1], bool), [(1, 2, 4)], [None])
