"""JSON of others: every wrong value is named with its file, its key and what is expected."""

import json
import os
from pathlib import Path

import pytest

from spatial_ssrl_jax.common.bounds import Bounds
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import JsonObject, parse_json, read_json, read_object

COUNT = Bounds(min=1, max=9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.json is empty: fetch it again"),
        (b"\0\0\n", "a.json is empty"),
        (b"{", "a.json is not valid JSON .*: fetch it again"),
        (b'{"a": 1} 2', "is not valid JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "is not valid JSON .*recursion"),
        (b"1" * 5000, r"is not valid JSON \(Exceeds the limit .* 5000 digits\)"),
        (b'{"a": "\xff"}', r"is not UTF-8 text \(at byte 7\)"),
        (rb'{"a": "\ud800"}', "holds half of a character"),
    ],
)
def test_what_is_no_json_is_named(content: bytes, message: str):
    with pytest.raises(UserError, match=message):
        parse_json(content, "a.json")


def test_a_byte_order_mark_and_surrogate_pairs_are_read():
    assert parse_json("\ufeff[1]".encode(), "a") == [1]
    assert parse_json(json.dumps("😀").encode(), "a") == "😀"


def test_what_is_no_file_is_named(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(UserError, match="is a folder or a pipe, not a file: look again"):
            read_json(tmp_path / name, "look again")
    (tmp_path / "list").write_text("[]")
    with pytest.raises(UserError, match="list holds no JSON object"):
        read_object(tmp_path / "list")


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("text", int, r'\(x\.text is "7", expected a whole number, at least 1 and at most 9\)'),
        ("true", int, r"\(x\.true is true, expected a whole number"),
        ("true", float, r"\(x\.true is true, expected a number"),
        ("half", int, r"\(x\.half is 0\.5, expected a whole number"),
        ("ten", int, r"\(x\.ten is 10, expected"),
        ("ten", float, r"\(x\.ten is 10, expected"),
        ("huge", float, r"\(x\.huge is 1000"),
        ("infinite", float, r"\(x\.infinite is Infinity, expected"),
        ("half", str, r"\(x\.half is 0\.5, expected text\)"),
        ("half", bool, r"expected true or false"),
        ("text", list, r"expected a list"),
        ("text", dict, r"expected an object"),
        ("null", int, r"lacks the key 'x\.null'"),
        ("missing", int, r"lacks the key 'x\.missing'"),
    ],
)
def test_a_wrong_value_is_named(key: str, kind: type, message: str):
    values = {"text": "7", "true": True, "half": 0.5, "ten": 10, "null": None}
    values |= {"huge": 10**400, "infinite": float("inf")}
    found = JsonObject(values, "a.json", prefix="x.")
    with pytest.raises(UserError, match=rf"^a\.json .*{message}.*: fetch it again\.$"):
        found.get(key, kind, bounds=COUNT if kind in (int, float) else None)


def test_values_and_defaults():
    found = JsonObject({"a": 1, "b": None, "c": [1, 2], "d": {"e": "f"}}, "a.json")
    assert found.get("a", int, bounds=COUNT) == found.get("a", float) == 1
    assert found.get("b", int, 3) == 3 and found.find("b", int) is None
    assert found.get("no", bool, False) is False
    assert found.items("c", int, length=2) == (1, 2) and found.items("b", int, (7,)) == (7,)
    assert found.section("d").get("e", str) == "f" and found.section("b").values == {}
    with pytest.raises(UserError, match=r"c is \[1, 2\], expected a list of 3"):
        found.items("c", int, length=3)
    with pytest.raises(UserError, match="c is .*expected text"):
        found.items("c", str)
