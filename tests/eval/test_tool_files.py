"""Files of other tools that are damaged, dangerous or none: each is refused in a sentence."""

import importlib.util
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from spatial_ssrl_jax.eval.benchmarks import xlsx
from tests.helpers import tool_answers as tools


@pytest.mark.parametrize("written", ["B_x000D_\nso", "x" * xlsx.LONGEST_CELL])
def test_what_excel_does_to_a_cell(scored: Callable, written: str, tmp_path: Path):
    given = tools.write_kit_table(tmp_path / "M_BLINK.xlsx", tools.write_blink(tmp_path), [written])
    found, said = scored(tmp_path / "out", given)
    cut = len(written) == xlsx.LONGEST_CELL
    assert ("answers that fill their cell, and may lack their end: 4" in said) == cut
    assert found[0].response == (written if cut else "B\r\nso")


def xlsx_of(folder: Path, replace: bytes = b"", by: bytes = b"") -> Path:
    """A table in Excel's format, with something replaced in its sheet."""
    path = tools.write_table(folder, lambda rows: None, "M_BLINK.xlsx")
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content.replace(replace, by) if replace else content)
    return path


def test_an_xlsx_is_read_whole_whatever_it_says_of_itself(
    score: Callable, recwarn: pytest.WarningsRecorder, tmp_path: Path
):
    for replace, by in (
        (b'<dimension ref="A1:H5"', b'<dimension ref="A1:A2"'),
        (b"cellStyles", b"cellStyleX"),
    ):
        code, out, _ = score("--score", xlsx_of(tmp_path, replace, by))
        assert code == 0 and "of 4" in out and not recwarn.list


def bad(content: bytes, name: str = "M_BLINK.tsv") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def half(folder: Path) -> Path:
    path = xlsx_of(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def folder_of(folder: Path) -> Path:
    (folder / "M_BLINK.tsv").mkdir()
    return folder / "M_BLINK.tsv"


BAD_FILES = {
    "pickle": (bad(b"x", "M_BLINK.pkl"), "is a pickle, which runs code when it is read: give its"),
    "scores": (bad(b"x", "M_BLINK_acc.csv"), "tables of scores, which hold no answers"),
    "missing": (lambda folder: folder / "M_BLINK.tsv", "there is no such file"),
    "empty": (bad(b""), "holds no row: copy or download it again"),
    "not UTF-8": (bad(b"index\tprediction\n\xff\t1\n"), "M_BLINK.tsv cannot be read .Unicode"),
    "empty JSON": (bad(b"[]", "M_BLINK.json"), "holds no row"),
    "half of JSON": (bad(b'[{"index": 1', "M_BLINK.json"), "is not valid JSON"),
    "empty xlsx": (bad(b"", "M_BLINK.xlsx"), "is no Excel table, or only a part of one"),
    "half of xlsx": (half, "is no Excel table, or only a part of one"),
    "damaged xlsx": (partial(xlsx_of, replace=b"<sheetData", by=b"<"), "cannot be read"),
    "rows that are far away": (
        partial(xlsx_of, replace=b'<row r="2"', by=b'<row r="999999999"'),
        "holds no row",
    ),
    "folder": (folder_of, "M_BLINK.tsv is a folder or a pipe, not a file"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_in_a_sentence(score: Callable, kind: str, tmp_path: Path):
    if "xlsx" in kind:
        pytest.importorskip("openpyxl", reason="reads xlsx, which needs openpyxl")
    make, message = BAD_FILES[kind]
    code, out, err = score("--score", make(tmp_path), "--benchmark=blink")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err), err


def test_an_xlsx_that_unpacks_to_too_much_is_refused(
    score: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    given = xlsx_of(tmp_path)
    monkeypatch.setattr(xlsx, "_LARGEST", 1000)
    code, _, err = score("--score", given)
    assert code == 2 and re.search("unpacks to .* GiB .*: save the table as TSV.$", err)


def test_without_openpyxl_a_sentence_says_what_to_install(
    score: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = score("--score", bad(b"x", "M_BLINK.xlsx")(tmp_path))
    assert code == 2 and "pip install 'spatial_ssrl_jax[xlsx]', or save the table as TSV" in err
