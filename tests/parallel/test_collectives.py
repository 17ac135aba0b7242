"""What is gathered from processes keeps its shape and type."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from spatial_ssrl_jax.parallel.collectives import all_gather


@pytest.mark.parametrize(
    "mine", [np.array([0.1, np.nan]), np.arange(6).reshape(2, 3), np.zeros((1, 0), np.uint8)]
)
def test_gathered_rows_are_those_of_every_process(mine: np.ndarray, monkeypatch):
    """Also where no process has any column, as without names of a reward's parts."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda x, tiled: np.concatenate([x, x])
    )
    gathered = all_gather({"x": mine})["x"]
    assert gathered.dtype == mine.dtype
    np.testing.assert_array_equal(gathered, np.concatenate([mine, mine]))
