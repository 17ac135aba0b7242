"""Gaps between programs, by a clock that the test sets."""

import time

import pytest

from spatial_ssrl_jax.parallel.host_gap import HostGap


def test_gaps_add_up_and_an_open_one_is_in_both_steps(monkeypatch: pytest.MonkeyPatch):
    gap = HostGap()
    steps = [
        (0, gap.end), (1, gap.begin), (2, gap.begin), (4, gap.end), (5, gap.end), (7, gap.begin),
        (8, gap.take), (10, gap.end), (11, gap.take), (12, gap.take),
    ]  # fmt: skip
    found = []
    for now, call in steps:
        monkeypatch.setattr(time, "perf_counter", lambda now=now: float(now))
        found.append(call())
    assert [seconds for seconds in found if seconds is not None] == [3 + 1, 2, 0]
