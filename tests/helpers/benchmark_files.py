"""Small files in the published formats of the benchmarks, with images and clips to match."""

import base64
import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from spatial_ssrl_jax.eval.benchmarks.prompts import SPATIAL457_LEVELS


def png(seed: int) -> bytes:
    """An encoded image of one colour: red is the seed."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (seed % 256, 100, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(seed: int) -> str:
    return base64.b64encode(png(seed)).decode()


def seed_of(image: np.ndarray) -> int:
    return int(image[0, 0, 0])


def write_tsv(path: Path, rows: Sequence[dict]) -> Path:
    """Rows as pandas writes them: no value is an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows))
    return path


def write_media(folder: Path, names: Iterable[str], content: bytes | None = None) -> None:
    """One image (or other content) under each of the names."""
    source = folder / "one.bin"
    source.write_bytes(png(7) if content is None else content)
    for name in set(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.symlink_to(source)


def mcq_row(index: int, answer: str = "A", **more) -> dict:
    """A row of VLMEvalKit's multiple choice."""
    row = {"index": index, "question": f"What is {index}?", "A": "chair", "B": "table", "C": ""}
    return {**row, "answer": answer, "category": "thing", "image": encoded(index), **more}


def write_mcq(folder: Path, name: str) -> Path:
    rows = [mcq_row(i, "AB"[i % 2], hint="Look." if i == 1 else "") for i in range(4)]
    return write_tsv(folder / name, rows)


def write_3dsrbench(folder: Path) -> Path:
    """Two questions, each mirrored and in another order; later rows name the first's image."""
    kinds = ("", "-1", "-flip", "-flip-1")
    rows = [
        mcq_row(10 * q + k, qid=f"ABCDEF0{q}{kind}", image=encoded(q) if k == 0 else 10 * q)
        for q in range(2)
        for k, kind in enumerate(kinds)
    ]
    return write_tsv(folder / "3DSRBench.tsv", rows)


def write_mmbench(folder: Path, name: str = "MMBench_DEV_EN_V11.tsv", answer: bool = True) -> Path:
    """Two questions in two rotations."""
    rows = [
        mcq_row(
            1_000_000 * rotation + q,
            "AB"[rotation] if answer else "",
            image=encoded(q) if rotation == 0 else q,
        )
        for q in (241, 252)
        for rotation in range(2)
    ]
    return write_tsv(folder / name, rows)


def write_blink(folder: Path) -> Path:
    rows = [mcq_row(i, image=str([encoded(i), encoded(i + 100)])) for i in range(3)]
    return write_tsv(folder / "BLINK.tsv", rows)


def write_spatial457(folder: Path) -> Path:
    rows = [
        {
            "index": i,
            "question": "Is there?",
            "answer": "Yes",
            "category": level,
            "image": encoded(i),
        }
        for i, level in enumerate(SPATIAL457_LEVELS)
    ]
    return write_tsv(folder / "Spatial457.tsv", rows)


def write_qspatial(folder: Path, held: Sequence[int] = (0, 1, 2)) -> Path:
    """Three rows, of which those that are `held` have their image's bytes."""
    rows = [
        {
            "question": f"How far is {i}?",
            "answer_value": 50.0 + i,
            "answer_unit": "cm",
            "question_type": "horizontal_distance",
            "image_path": f"{i}.png",
            "image": {"bytes": png(i) if i in held else None, "path": f"{i}.png"},
        }
        for i in range(3)
    ]
    path = folder / "QSpatial_plus-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def write_whatsup(folder: Path, parts: dict[str, list[list[str]]] | None = None) -> Path:
    """Both parts; without captions given, three questions each."""
    some = [[f"{n} {side} of it" for side in ("on", "under", "left", "right")] for n in range(3)]
    names = {"A": "controlled_images", "B": "controlled_clevr"}
    for part, captions in (parts or {"A": some, "B": some}).items():
        rows = [
            {"image_path": f"data/{names[part]}/{i}.jpeg", "caption_options": options}
            for i, options in enumerate(captions)
        ]
        write_json(folder / f"{names[part]}_dataset.json", rows)
        write_media(folder, (row["image_path"] for row in rows))
    return folder


def write_viewspatial(folder: Path) -> Path:
    rows = [
        {
            "question_type": "Camera perspective - Relative Direction",
            "image_path": [f"ViewSpatial-Bench/a/{i}.jpg", f"ViewSpatial-Bench/b/{i}.jpg"],
            "question": f"Where is {i}?",
            "answer": "B. left",
            "choices": "A. right\nB. left",
        }
        for i in range(2)
    ]
    write_media(folder, (name for row in rows for name in row["image_path"]))
    return write_json(folder / "ViewSpatial-Bench.json", rows)


def write_vsi(folder: Path) -> Path:
    no_options = dict.fromkeys("ABCD")
    rows = [
        {
            "mp4_path": "rooms/1.mp4",
            "question_type": "object_counting",
            "question": "How many?",
            "answer": "4",
            **no_options,
        },
        {
            "mp4_path": "rooms/1.mp4",
            "question_type": "object_rel_direction_easy",
            "question": "Where?",
            "answer": "B",
            **no_options,
            "A": "A. left",
            "B": "B. right",
        },
    ]
    write_media(folder, ["rooms/1.mp4"], b"clip")
    return write_json(folder / "vsi_bench.json", rows)


def write_vsi_hub(folder: Path) -> Path:
    """The questions of `write_vsi` in the Hub's layout, whose ids have gaps."""
    write_vsi(folder)
    rows = [
        {
            "id": 3 * i,
            "dataset": "rooms",
            "scene_name": "1",
            "question_type": kind,
            "question": question,
            "ground_truth": answer,
            "options": options,
            "pruned": False,
        }
        for i, (kind, question, answer, options) in enumerate(
            [
                ("object_counting", "How many?", "4", None),
                ("object_rel_direction_easy", "Where?", "B", ["A. left", "B. right"]),
            ]
        )
    ]
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_vsi_tsv(folder: Path) -> Path:
    """The questions of `write_vsi` as VLMEvalKit has them, in another order."""
    hub = [json.loads(line) for line in write_vsi_hub(folder).read_text().splitlines()]
    rows = [
        {
            "index": i,
            "video": "rooms/1.mp4",
            "question": row["question"],
            "question_type": row["question_type"],
            "candidates": row["options"] and str(row["options"]),
            "answer": row["ground_truth"],
        }
        for i, row in enumerate(hub)
    ]
    return write_tsv(folder / "VSI-Bench.tsv", rows[::-1])


def write_viewspatial_tsv(folder: Path) -> Path:
    """The questions of `write_viewspatial` as VLMEvalKit has them, in another order."""
    of_json = json.loads(write_viewspatial(folder).read_text())
    rows = [
        {
            "index": i,
            "image_path": str(row["image_path"]),
            "question": row["question"],
            "question_type": row["question_type"],
            "candidates": row["choices"] if i else str(row["choices"].split("\n")),
            "answer": row["answer"],
        }
        for i, row in enumerate(of_json)
    ]
    return write_tsv(folder / "ViewSpatialBench.tsv", rows[::-1])


def write_hallusion(folder: Path) -> Path:
    """A figure with two questions, and one question of text alone."""
    rows = [
        {
            "category": "VS",
            "subcategory": "chart",
            "visual_input": str(visual),
            "set_id": "0",
            "figure_id": str(visual),
            "question_id": str(question),
            "question": "Is it so?",
            "gt_answer": str(question),
            "filename": f"./VS/chart/0_{visual}.png" if visual else None,
        }
        for visual, question in ((0, 0), (1, 0), (1, 1))
    ]
    write_media(folder, (row["filename"] for row in rows if row["filename"]))
    return write_json(folder / "HallusionBench.json", rows)


def write_hallusion_tsv(folder: Path, index: bool = True) -> Path:
    """The questions of `write_hallusion` with their images inside; `index` has the six fields."""
    fields = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")
    rows = []
    for number, row in enumerate(json.loads(write_hallusion(folder).read_text())):
        name = "_".join(row[field] for field in fields) if index else number
        groups = {"l2-category": "chart"} if index else {field: row[field] for field in fields}
        image = encoded(number) if row["filename"] else ""
        answer = ("No", "Yes")[int(row["gt_answer"])]
        more = {"question": row["question"], "answer": answer, "category": row["category"]}
        rows.append({"index": name, **more, **groups, "image": image})
    return write_tsv(folder / "HallusionBench.tsv", rows)


def write_ocrbench(folder: Path) -> Path:
    rows = [
        {
            "dataset_name": "IIIT5K",
            "id": i,
            "image_path": f"IIIT5K/{i}.png",
            "question": "what is written in the image?",
            "answers": answers,
            "type": kind,
        }
        for i, (answers, kind) in enumerate(
            [
                ("CENTRE", "Regular Text Recognition"),
                (["ANTONIOS", "ANTONIO'S"], "Irregular Text Recognition"),
                ("x ^ 2 = 4\n", "Handwritten Mathematical Expression Recognition"),
            ]
        )
    ]
    write_media(folder, (row["image_path"] for row in rows))
    return write_json(folder / "OCRBench.json", rows)


def write_chartqa(folder: Path) -> Path:
    rows = [
        {
            "index": i,
            "question": f"How much is {i}?",
            "answer": "14",
            "split": f"test_{('human', 'augmented')[i % 2]}",
            "image": encoded(i),
        }
        for i in range(4)
    ]
    return write_tsv(folder / "ChartQA_TEST.tsv", rows)


def write_ocrbench_tsv(folder: Path) -> Path:
    """The questions of `write_ocrbench` as VLMEvalKit has them."""
    rows = [
        {
            "index": i,
            "question": row["question"],
            "answer": str(row["answers"]),
            "category": row["type"],
            "image": encoded(i),
        }
        for i, row in enumerate(json.loads(write_ocrbench(folder).read_text()))
    ]
    return write_tsv(folder / "OCRBench.tsv", rows)


# Of each benchmark: writes its files into a folder and returns what --data takes.
WRITERS = {
    "spatial457": write_spatial457,
    "3dsrbench": write_3dsrbench,
    "spatialeval": lambda folder: write_mcq(folder, "SpatialEval.tsv"),
    "qspatial_plus": write_qspatial,
    "whatsup": write_whatsup,
    "viewspatial": write_viewspatial,
    "vsi_bench": write_vsi,
    "mmbench": write_mmbench,
    "blink": write_blink,
    "hallusionbench": write_hallusion,
    "realworldqa": lambda folder: write_mcq(folder, "RealWorldQA.tsv"),
    "ocrbench": write_ocrbench,
    "chartqa": write_chartqa,
    "seedbench2_plus": lambda folder: write_mcq(folder, "SEEDBench2_Plus.tsv"),
}
