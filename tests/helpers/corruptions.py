"""Damage to files, drawn at random: wrong values in JSON, and broken bytes in any file.

A corruption is a pair: a label for reports, and the damaged content or a function that puts
something else in the file's place.
"""

import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Corruption = tuple[str, bytes | Callable[[Path], None]]
Corrupt = Callable[[Random, bytes], Corruption]

# What takes the place of a value, as it is written in JSON.
VALUES = (
    *("null", "true", "false", "-1", "0", "1", "2", "0.5", "1e400", "NaN", "-1e99"),
    *(str(10**9), str(10**30), "1" * 5000),
    *('""', '"wrong"', '"7"', r'"\ud800"', r'"a\u0000b"', '"' + "x" * 5000 + '"', '"<image>"'),
    *("[]", "[null]", "[1]", "[[]]", '["a", 2]', "{}", '{"a": [1]}', '{"bytes": null}'),
    *("[" * 50 + "]" * 50, "[" * 100_000 + "]" * 100_000),
)
_HERE = "@here@"


def json_value(rng: Random, content: bytes) -> Corruption:
    """JSON with one value replaced, removed or given twice."""
    whole = json.loads(content)
    path = _choose(rng, whole)
    kind = rng.choice(["replaced"] * 8 + ["removed", "twice"])
    holder: Any = whole
    for key in path[:-1]:
        holder = holder[key]
    name = ".".join(map(str, path)) or "the whole"
    if kind == "removed" and path:
        del holder[path[-1]]
        return f"{name} removed", json.dumps(whole).encode()
    value = rng.choice(VALUES)
    short = value if len(value) < 40 else f"{value[:20]}… ({len(value)})"
    if kind == "twice" and path and isinstance(holder, dict):
        pair = f"{json.dumps(path[-1])}: {value}, "
        text = json.dumps(whole).replace(json.dumps(path[-1]) + ":", pair + "{0}", 1)
        return f"{name} twice, {short}", text.replace("{0}", json.dumps(path[-1]) + ":").encode()
    if not path:
        return f"{name} = {short}", value.encode()
    holder[path[-1]] = _HERE
    return f"{name} = {short}", json.dumps(whole).replace(f'"{_HERE}"', value, 1).encode()


def _choose(rng: Random, whole: Any) -> tuple:
    """The path of a value: often a field of the object itself, else any depth."""
    path, value = (), whole
    deeper = 0.95
    while isinstance(value, dict | list) and value and rng.random() < deeper:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        path += (rng.choice(keys),)
        value, deeper = value[path[-1]], 0.8
    return path


def text(rng: Random, content: bytes) -> Corruption:
    """What breaks any text: its end, its encoding, its start."""
    cut = rng.randrange(max(len(content), 1))
    junk = rng.randbytes(200)
    return rng.choice(
        [
            (f"cut after {cut}", content[:cut]),
            (f"junk at {cut}", content[:cut] + junk + content[cut:]),
            (f"not UTF-8 at {cut}", content[:cut] + b"\xff\xfe" + content[cut:]),
            ("UTF-16", content.decode("utf-8", "replace").encode("utf-16")),
            ("BOM", b"\xef\xbb\xbf" + content),
            ("empty", b""),
            ("spaces", b" \n \n"),
            ("web page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
            ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            ("binary", rng.randbytes(3000)),
            ("zeros", bytes(len(content))),
            (f"NUL at {cut}", content[:cut] + b"\0" + content[cut:]),
            ("twice", content + content),
            ("Windows lines", content.replace(b"\n", b"\r\n")),
        ]
    )


def json_file(rng: Random, content: bytes) -> Corruption:
    return json_value(rng, content) if rng.random() < 0.8 else text(rng, content)


def json_lines(rng: Random, content: bytes) -> Corruption:
    """One line of JSONL damaged."""
    if rng.random() < 0.2:
        return text(rng, content)
    lines = content.splitlines()
    number = rng.randrange(len(lines))
    label, line = json_file(rng, lines[number])
    assert isinstance(line, bytes)
    lines[number] = line
    return f"line {number}: {label}", b"\n".join(lines) + b"\n"


def table_text(rng: Random, content: bytes) -> Corruption:
    """One cell, column or row of a TSV file damaged."""
    if rng.random() < 0.3:
        return text(rng, content)
    rows = [line.split(b"\t") for line in content.split(b"\n") if line]
    row, column = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
    cells = (b"", b" ", b"wrong", b'"', b"\xff", b"[", b"['a', 1]", b"[" * 5000, b"-1", b"0",
             b"nan", b"1e400", b"9" * 5000, b"\0", b"/etc", b"aGVsbG8=", b"{}", "²".encode(),
             b"['x']" * 3, b"x" * 200_000)  # fmt: skip
    kind = rng.choice(["cell"] * 6 + ["column", "row"])
    if kind == "column":
        rows = [cells[:column] + cells[column + 1 :] for cells in rows]
    elif kind == "row":
        rows[row] = rows[row][: rng.randrange(len(rows[row]))]
    else:
        rows[row][column] = rng.choice(cells)
        kind += f" = {rows[row][column][:20]!r}"
    return f"row {row}, column {column}: {kind}", b"\n".join(map(b"\t".join, rows)) + b"\n"


def binary(rng: Random, content: bytes) -> Corruption:
    """Bits, lengths and the end of any file damaged."""
    size = max(len(content), 16)
    data = bytearray(content.ljust(16, b"\0"))
    at = rng.randrange(size)
    kind = rng.choice(["bits", "bits", "bits", "head bits", "cut", "zeros", "lengths", "other"])
    if kind in ("bits", "head bits"):
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(min(size, 200) if kind == "head bits" else size)] ^= (
                1 << rng.randrange(8)
            )
    elif kind == "cut":
        data = data[:at]
    elif kind == "zeros":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "lengths":
        at = 4 * rng.randrange(min(size // 4, 20))
        data[at : at + 8] = rng.choice([b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\x7f" * 2])
    else:
        kind, data = rng.choice(_OTHER)
    return f"{kind} at {at}", bytes(data)


_OTHER = [
    ("empty", b""),
    ("a text", b"404 Not Found\n"),
    ("JSON", b'{"a": 1}'),
    ("a zip", b"PK\3\4" + bytes(100)),
    ("a PNG's head", b"\x89PNG\r\n\x1a\n" + bytes(30)),
    ("parquet's ends", b"PAR1" + bytes(40) + b"PAR1"),
    ("HDF5's head", b"\x89HDF\r\n\x1a\n" + bytes(90)),
    ("a pickle", b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x07builtin\x94."),
]


def safetensors(rng: Random, content: bytes) -> Corruption:
    """The header's JSON or length damaged, or any byte."""
    if rng.random() < 0.3:
        return binary(rng, content)
    length = struct.unpack("<Q", content[:8])[0]
    label, header = json_file(rng, content[8 : 8 + length])
    assert isinstance(header, bytes)
    return f"header: {label}", struct.pack("<Q", len(header)) + header + content[8 + length :]


def npy(rng: Random, content: bytes) -> Corruption:
    """An array of another kind or shape, a header that promises more than there is, or bytes."""
    good = np.load(io.BytesIO(content))
    others = {
        "text": np.full(good.shape, "x"),
        "complex": good.astype(complex),
        "records": np.zeros(good.shape, [("a", "f4")]),
        "times": np.zeros(good.shape, "M8[s]"),
        "a number": np.float32(1),
        "no rows": good[:0],
        "five axes": good[None, None, None],
        "RGB": np.repeat(good[..., None], 3, -1),
        "float16": good.astype(np.float16),
        "bool": good > 0,
        "objects": np.full(good.shape, None),
    }
    if rng.random() < 0.4:
        return binary(rng, content)
    label = rng.choice([*others, "huge shape", "huge shape", "several"])
    file = io.BytesIO()
    if label == "huge shape":
        shape = rng.choice([(10**6, 10**6), (2**62, 4), (-1, 5), (10**9, 2)])
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(400))
    elif label == "several":
        np.savez(file, a=good, b=good)
    else:
        np.save(file, others[label], allow_pickle=True)
    return label, file.getvalue()


def hdf5(rng: Random, content: bytes) -> Corruption:
    """Data sets of other kinds and shapes, groups in their place, or bytes."""
    if rng.random() < 0.5:
        return binary(rng, content)
    makers: dict[str, Callable[[h5py.File], object]] = {
        "huge": lambda f: f.create_dataset("depth", (10**6, 10**6), "f4", chunks=(64, 64)),
        "text": lambda f: f.create_dataset("depth", data=["a", "b"]),
        "a group": lambda f: f.create_group("depth"),
        "nothing": lambda f: None,
        "no values": lambda f: f.create_dataset("depth", data=h5py.Empty("f4")),
        "a link to nothing": lambda f: f.__setitem__("depth", h5py.SoftLink("/gone")),
        "a link outside": lambda f: f.__setitem__("depth", h5py.ExternalLink("gone.h5", "/a")),
        "records": lambda f: f.create_dataset("depth", (4, 4), [("a", "f4")]),
        "references": lambda f: f.create_dataset("depth", (4, 4), h5py.ref_dtype),
        "a number": lambda f: f.create_dataset("depth", data=1.0),
    }
    label, file = rng.choice(list(makers)), io.BytesIO()
    with h5py.File(file, "w") as made:
        makers[label](made)
    return label, file.getvalue()


def parquet(rng: Random, content: bytes) -> Corruption:
    """A column removed, renamed or of another type, values or rows missing, or bytes."""
    if rng.random() < 0.4:
        return binary(rng, content)
    table = pq.read_table(io.BytesIO(content))
    name = rng.choice(table.column_names)
    kind = rng.choice(["removed", "renamed", "no rows", *["values"] * 4])
    index, rows = table.column_names.index(name), len(table)
    others = {
        "nulls": pa.nulls(rows),
        "typed nulls": pa.nulls(rows, table.column(name).type),
        "numbers": pa.array(range(rows)),
        "texts": pa.array(["wrong"] * rows),
        "empty texts": pa.array([""] * rows),
        "bytes": pa.array([b"\xff\xfe"] * rows),
        "lists": pa.array([["a"]] * rows),
        "empty lists": pa.array([[]] * rows, pa.list_(pa.string())),
        "lists of null": pa.array([[None]] * rows, pa.list_(pa.string())),
        "structs": pa.array([{"a": 1}] * rows),
        "empty images": pa.array([[{"bytes": b"", "path": ""}]] * rows),
        "images without bytes": pa.array([[{"path": "gone.png"}]] * rows),
        "dates": pa.array([0] * rows, pa.timestamp("s")),
        "NaN": pa.array([float("nan")] * rows),
        "maps": pa.array([[("a", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
    }
    if kind == "removed":
        table = table.remove_column(index)
    elif kind == "renamed":
        table = table.rename_columns([n if n != name else "other" for n in table.column_names])
    elif kind == "no rows":
        table = table.slice(0, 0)
    else:
        kind = rng.choice(list(others))
        table = table.set_column(index, name, others[kind])
    file = io.BytesIO()
    pq.write_table(table, file)
    return f"{name}: {kind}", file.getvalue()


def place(rng: Random, content: bytes) -> Corruption:
    """Something else where the file was."""

    def folder(path: Path) -> None:
        path.mkdir()
        (path / "x").write_bytes(content)

    def unreadable(path: Path) -> None:
        path.write_bytes(content)
        path.chmod(0)

    return rng.choice(
        [
            ("a folder", folder),
            ("unreadable", unreadable),
            ("a pipe", os.mkfifo),
            ("a link to nothing", lambda path: path.symlink_to("gone")),
            ("a link to itself", lambda path: path.symlink_to(path.name)),
            ("missing", lambda path: None),
            ("endless", lambda path: path.symlink_to("/dev/zero")),
        ]
    )
