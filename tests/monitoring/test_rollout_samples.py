"""Samples of rollouts: JSONL whose images are beside it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from spatial_ssrl_jax.monitoring.rollout_samples import read_rollouts, write_rollouts


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)


def test_rows_come_back_with_images_as_files(tmp_path: Path):
    images = [image(0), image(1)]
    rows = [{"task": "crop", "images": images}, {"task": "flip", "images": [image(2)]}]
    path = write_rollouts(tmp_path, 10, rows)
    assert path == tmp_path / "rollouts" / "step_000010.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["task"] for line in lines] == ["crop", "flip"]
    assert all(line["step"] == 10 for line in lines)
    assert [len(line["images"]) for line in lines] == [2, 1]
    for name, original in zip(lines[0]["images"], images, strict=True):
        assert np.array_equal(np.asarray(Image.open(path.parent / name)), original)
    assert rows[0]["images"] is images
    assert not list(path.parent.glob("*.partial"))


def test_files_are_read_oldest_first_and_of_many_some_of_the_whole_run(tmp_path: Path):
    for step in (9, 10, 100, 2):
        write_rollouts(tmp_path, step, [{"images": []}])
    assert [row["step"] for row in read_rollouts(tmp_path, 4)] == [2, 9, 10, 100]
    assert [row["step"] for row in read_rollouts(tmp_path, 2)] == [2, 100]


def test_a_step_written_again_is_replaced(tmp_path: Path):
    write_rollouts(tmp_path, 5, [{"n": 1, "images": []}, {"n": 2, "images": []}])
    write_rollouts(tmp_path, 5, [{"n": 3, "images": []}])
    assert [row["n"] for row in read_rollouts(tmp_path, 9)] == [3]


def test_no_folder_reads_as_no_rows(tmp_path: Path):
    assert read_rollouts(tmp_path, 4) == []


def test_damaged_lines_are_left_out(tmp_path: Path):
    path = write_rollouts(tmp_path, 5, [{"n": 1, "images": []}, {"n": 2, "images": []}])
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, b"\xff", b"[]", second[:-3], second]))
    assert [row["n"] for row in read_rollouts(tmp_path, 9)] == [1, 2]
