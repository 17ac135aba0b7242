"""Damaged files of every kind: each is read, or ends in a sentence, within time and memory.

Some cases of each kind; `python -m tests.helpers.fuzz --count=40` runs as many as wanted.
"""

import re
from pathlib import Path

import pytest

pytest.importorskip("av", reason="writes and reads videos, which needs PyAV")

from tests.helpers.fuzz import ACCEPTED, SENTENCE, fuzz  # noqa: E402
from tests.helpers.fuzz_inputs import Input, every_input  # noqa: E402

CASES, SEED = 3, 11
MEGABYTES = 700  # that a case may hold at most; a large image is decoded whole
INPUTS = every_input()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("kind", INPUTS, ids=[kind.name for kind in INPUTS])
def test_damage_ends_in_a_sentence(kind: Input):
    for case in fuzz([kind], CASES, SEED):
        assert case.outcome in (ACCEPTED, SENTENCE), case
        assert case.memory < MEGABYTES << 20, case
        if case.outcome == SENTENCE:
            assert re.fullmatch(r"\S.{10,}[.?]", case.text), case
