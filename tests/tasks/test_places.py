"""Places of points in words."""

import pytest

from spatial_ssrl_jax.tasks.places import places_in_words


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([(0, 0), (89, 59)], "1 is upper left, 2 is lower right."),
        ([(29, 19), (30, 20)], "1 is upper left, 2 is middle centre."),
        ([(59, 39), (60, 40), (0, 59)], "1 is middle centre, 2 is lower right, 3 is lower left."),
    ],
)
def test_thirds_of_an_image(points, words: str):
    """Of 60 rows and 90 columns."""
    assert places_in_words(points, (60, 90, 3)) == words
