"""Lengths of responses for timings and plans."""

from pathlib import Path

import numpy as np
import pytest

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.perf.response_lengths import LogNormalLengths, parse_lengths


def test_the_model_draws_what_it_says():
    text = "mean=300,sigma=0.6,cap=2048,correlation=0.4"
    found = parse_lengths(text).draw(np.random.default_rng(0), 20_000, 5)
    assert found.shape == (20_000, 5) and found.dtype == np.int32
    assert found.mean() == pytest.approx(300, rel=0.01)
    logs = np.log(found)
    assert logs.std() == pytest.approx(0.6, rel=0.02)
    assert np.corrcoef(logs[:, 0], logs[:, 1])[0, 1] == pytest.approx(0.4, abs=0.02)
    assert found.min() >= 1 and found.max() == 2048


def test_what_is_left_out_has_a_default():
    assert parse_lengths("mean=50") == LogNormalLengths(mean=50.0)
    rows = parse_lengths("mean=50,sigma=0").draw(np.random.default_rng(0), 2, 3)
    assert rows.tolist() == [[50] * 3] * 2
    capped = parse_lengths("mean=50,sigma=2,cap=40").draw(np.random.default_rng(0), 99, 3)
    assert capped.max() == 40


def test_a_file_has_a_length_or_a_group_a_line(tmp_path: Path):
    (tmp_path / "x").write_text("1 2 3\n\n4, 5, 6\n")
    found = parse_lengths(str(tmp_path / "x"))
    rows = found.draw(np.random.default_rng(0), 50, 3)
    assert {tuple(sorted(row)) for row in rows.tolist()} == {(1, 2, 3), (4, 5, 6)}
    (tmp_path / "x").write_text("7\n8\n")
    rows = parse_lengths(str(tmp_path / "x")).draw(np.random.default_rng(0), 50, 3)
    assert rows.shape == (50, 3) and set(rows.ravel()) == {7, 8}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mean=0", "mean=0 is no number from 1"),
        ("mean=x", "mean=x is no number from 1"),
        ("sigma=-1", "sigma=-1 is no number from 0 to 10"),
        ("correlation=1.5", "correlation=1.5 is no number from 0 to 1"),
        ("men=3", "no 'men'; expected mean=300"),
        ("/nowhere", "cannot be read"),
    ],
)
def test_a_model_that_is_none(text: str, said: str):
    with pytest.raises(UserError, match=said):
        parse_lengths(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "has no lengths"), ("12\na\n", "line 2 of"), ("0\n", "line 1 of"), ("-3", "line 1 of")],
)
def test_a_file_without_lengths(tmp_path: Path, text: str, said: str):
    (tmp_path / "x").write_text(text)
    with pytest.raises(UserError, match=said):
        parse_lengths(str(tmp_path / "x"))
