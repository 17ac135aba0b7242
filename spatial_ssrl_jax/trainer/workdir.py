"""A run's folder: whether it is free or holds the same run, and its first files."""

import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from spatial_ssrl_jax.checkpoint.export import copy_files, write_config
from spatial_ssrl_jax.checkpoint.models import ModelFolder
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.paths import (
    atomic_folder,
    check_output_folder,
    claim_output_folder,
    in_bucket,
    write_atomic,
)
from spatial_ssrl_jax.config.load import to_dict
from spatial_ssrl_jax.config.schema import Config

# Sections and keys that may change when a run resumes: they change the results by rounding alone.
_SAFE_SECTIONS = ("checkpoint", "log", "mesh")
_SAFE_KEYS = (
    "grpo.steps",
    "data.threads",
    "data.workers",
    "model.attention",
    "model.remat",
    "rollout.attention",
)


def check_workdir(config: Config, workdir: epath.Path, overwrite: bool) -> bool:
    """Checks that a folder can be this run's; changes nothing.

    Returns:
      Whether the same run stopped there, and resumes.

    Raises:
      UserError: it is not writable, is not empty, or holds another run.
    """
    if not in_bucket(workdir):
        nearest = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            why = "is not writable" if nearest.is_dir() else "is a file"
            raise UserError(
                f"nothing can be written to {workdir} ({nearest} {why}): change --workdir."
            )
    path = workdir / "config.json"
    if overwrite or not path.is_file():
        check_output_folder(workdir, overwrite)
        return False
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): choose another --workdir, or give --overwrite."
        ) from error
    _check_same(before, json.loads(json.dumps(to_dict(config))), workdir)
    return True


def claim_workdir(config: Config, workdir: epath.Path, overwrite: bool) -> None:
    """Creates the folder or resumes in it, and writes `config.json`.

    Raises:
      UserError: as `check_workdir`.
    """
    if not check_workdir(config, workdir, overwrite):
        claim_output_folder(workdir, overwrite)
    # Beside the folder, so that an interrupted write does not leave a folder that is not empty.
    partial = workdir.parent / f".{workdir.name}-config.partial"
    text = json.dumps(to_dict(config), indent=2) + "\n"
    write_atomic(workdir / "config.json", text, partial)


def _check_same(before: dict[str, Any], now: dict[str, Any], workdir: epath.Path) -> None:
    changed = [key for key in _differences(before, now) if not _is_safe(key)]
    if changed:
        raise UserError(
            f"{workdir} holds a run with another config ({', '.join(changed[:4])} changed): "
            "resume with the old values, choose another --workdir, or give --overwrite."
        )


def _is_safe(key: str) -> bool:
    return key.split(".")[0] in _SAFE_SECTIONS or key in _SAFE_KEYS


def _differences(a: object, b: object, path: str = "") -> Iterator[str]:
    """The keys whose values differ between two nested dicts."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield path


def write_model_files(model: ModelFolder, folder: epath.Path) -> None:
    """Writes the model's config, tokenizer and processor files, unless they are there."""
    if (folder / "config.json").exists():
        return
    with atomic_folder(folder) as partial:
        copy_files(model, partial)
        write_config(model.config, partial, "float32")
