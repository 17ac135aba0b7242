"""Samples of rollouts that one can look at: JSONL with pictures beside it."""

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = "rollouts"


def write_rollouts(workdir: Path, step: int, rows: list[dict[str, Any]]) -> Path:
    """Writes `rollouts/step_000010.jsonl`; pictures go to `rollouts/images/` as PNG.

    Args:
      workdir: the run's folder.
      step: the run's step.
      rows: one a prompt, JSON types but for `images`: [H, W, 3] uint8 arrays, which are written
        as files and replaced by their paths relative to the JSONL.
    """
    folder = Path(workdir) / FOLDER
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        paths = []
        for i, image in enumerate(row["images"]):
            paths.append(f"images/step_{step:06d}_{number}_{i}.png")
            Image.fromarray(image).save(folder / paths[-1])
        lines.append(json.dumps({"step": step} | row | {"images": paths}) + "\n")
    path = folder / f"step_{step:06d}.jsonl"
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines))
    os.replace(partial, path)
    return path


def read_rollouts(workdir: Path, files: int) -> list[dict[str, Any]]:
    """The rows of at most `files` files, spread evenly from the first to the newest."""
    paths = sorted((Path(workdir) / FOLDER).glob("step_*.jsonl"))
    if len(paths) > files:
        last = len(paths) - 1
        paths = [paths[round(i * last / (files - 1))] for i in range(files)]
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]
