"""Samples of rollouts for people: JSONL files, with the images beside them."""

import io
import json
from typing import Any

from etils import epath
from PIL import Image

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import as_object, parse_json
from spatial_ssrl_jax.common.paths import read_files, write_atomic

FOLDER = "rollouts"


def write_rollouts(workdir: epath.PathLike, step: int, rows: list[dict[str, Any]]) -> epath.Path:
    """Writes `rollouts/step_000010.jsonl`; images go to `rollouts/images/` as PNG.

    Args:
      workdir: the run's folder.
      step: the run's step.
      rows: one for each prompt, of JSON types except `images`: [H, W, 3] uint8 arrays, which are
        written as files and replaced by their paths relative to the JSONL file.
    """
    folder = epath.Path(workdir) / FOLDER
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, row in enumerate(rows):
        paths = []
        for i, image in enumerate(row["images"]):
            paths.append(f"images/step_{step:06d}_{number}_{i}.png")
            buffer = io.BytesIO()
            # The fastest level makes files as large as the others do, of photos.
            Image.fromarray(image).save(buffer, "PNG", compress_level=1)
            (folder / paths[-1]).write_bytes(buffer.getvalue())
        lines.append(json.dumps({"step": step} | row | {"images": paths}) + "\n")
    path = folder / f"step_{step:06d}.jsonl"
    write_atomic(path, "".join(lines))
    return path


def read_rollouts(workdir: epath.PathLike, files: int) -> list[dict[str, Any]]:
    """The rows of at most `files` files, spread evenly from the oldest to the newest.

    Lines that are damaged are left out.
    """
    paths = sorted((epath.Path(workdir) / FOLDER).glob("step_*.jsonl"))
    if len(paths) > files:
        last = len(paths) - 1
        paths = [paths[round(i * last / (files - 1))] for i in range(files)]
    rows = (_row(line) for data in read_files(paths) for line in data.splitlines())
    return [row for row in rows if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        return dict(as_object(parse_json(line, FOLDER), FOLDER).values)
    except UserError:
        return None
