"""Small files of answers as VLMEvalKit and lmms-eval write them."""

import csv
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.helpers.benchmark_files import mcq_row, write_tsv


def write_kit_table(path: Path, questions: Path, answers: Sequence[str], **columns: str) -> Path:
    """VLMEvalKit's table, in the format of its ending, of answers in turn to a TSV's rows."""
    with questions.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row, answer in zip(rows, itertools.cycle(answers), strict=False):
        row.pop("image", None)
        row |= {"prediction": answer, **columns}
    return write_rows(path, rows)


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """Rows as pandas writes them into .xlsx, .tsv or .json; "" is a missing value."""
    numbers = [{k: int(v) if v.isdecimal() else v for k, v in row.items()} for row in rows]
    if path.suffix == ".json":
        values = [{k: math.nan if v == "" else v for k, v in row.items()} for row in numbers]
        path.write_text(json.dumps(values, indent=4, ensure_ascii=False))
    elif path.suffix == ".tsv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    else:
        reason = "reads and writes xlsx, which needs openpyxl"
        book = pytest.importorskip("openpyxl", reason=reason).Workbook()
        book.active.append(list(rows[0]))
        for row in numbers:
            book.active.append([None if v == "" else v for v in row.values()])
        book.save(path)
    return path


def write_blink(folder: Path, count: int = 4, kinds: Sequence[str] = ("thing",)) -> Path:
    """Questions of kinds in turn, whose right answers are A, B, A, …; the last marks its image."""
    rows = [mcq_row(i, "AB"[i % 2], category=kinds[i * len(kinds) // count]) for i in range(count)]
    rows[-1]["question"] = "<image>" + rows[-1]["question"]
    return write_tsv(folder / "BLINK.tsv", rows)


def write_table(
    folder: Path, change: Callable[[list[dict]], object], name: str = "M_BLINK.tsv"
) -> Path:
    """VLMEvalKit's answers A to `write_blink`, with something changed."""
    rows = [{**mcq_row(i, "AB"[i % 2]), "prediction": "A"} for i in range(4)]
    rows = [{k: str(v) for k, v in row.items() if k != "image"} for row in rows]
    change(rows)
    return write_rows(folder / name, rows)


def write_samples(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sample(number: int, **more) -> dict:
    """A line of lmms-eval 0.7 for a question of `write_blink`."""
    prompt = f"Note: one letter.\nWhat is {number}?\nA. chair\nB. table"
    row = {"doc_id": number, "target": f"({'AB'[number % 2]})", "filtered_resps": "A"}
    return {**row, "input": prompt, "blink_acc": {"id": f"val_{number}"}, **more}
