"""Sizes and checksums of a checkpoint's files, which tell whether it is damaged."""

import hashlib
import json
import os

from etils import epath

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.json_file import JsonObject, read_object
from spatial_ssrl_jax.common.paths import CRC32C, in_bucket, list_tree

CHECKSUMS_FILE = "checksums.json"
_CHANGING = "_CHECKPOINT_METADATA"  # Orbax writes to it after the rest is complete


def write_checksums(folder: epath.PathLike) -> None:
    """Writes `checksums.json` to a folder: size and SHA-256 of every file below it.

    In a bucket it holds the cloud's own CRC32C, since reading the files back would cost as much as
    the save itself.
    """
    folder = epath.Path(folder)
    sums = {
        name: (size, checksum or _sha256(folder / name))
        for name, (size, checksum) in sorted(_files(folder).items())
    }
    (folder / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=1) + "\n")


def find_damage(folder: epath.PathLike) -> str | None:
    """What is damaged in a folder, or None.

    Of a folder without `checksums.json` only this is checked, that it holds files alone. Only sizes
    are compared where a folder was copied into a bucket or out of one.
    """
    folder = epath.Path(folder)
    if (odd := _irregular(folder)) is not None:
        return f"{odd} is no file"
    if not (folder / CHECKSUMS_FILE).exists():
        return None
    try:
        expected = read_object(folder / CHECKSUMS_FILE)
        sums = {name: _size_and_sum(name, expected) for name in expected.values}
    except UserError:
        return f"{CHECKSUMS_FILE} is damaged"
    found = _files(folder)
    missing = sorted(sums.keys() - found.keys())
    if missing:
        return f"{missing[0]} is missing"
    for name, (size, checksum) in sums.items():
        if found[name][0] != size:
            return f"{name} was truncated or grew"
        comparable = checksum and checksum.startswith(CRC32C) == in_bucket(folder)
        if comparable and checksum != (found[name][1] or _sha256(folder / name)):
            return f"{name} was altered"
    return None


def _irregular(folder: epath.Path) -> str | None:
    """A pipe or device below a local folder, which a reader would wait for; None without any."""
    for place, _, names in () if in_bucket(folder) else os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if os.path.exists(path) and not os.path.isfile(path):
                return os.path.relpath(path, folder)
    return None


def _size_and_sum(name: str, sums: JsonObject) -> tuple[int, str | None]:
    """One file's entry in `checksums.json`; raises `UserError` where it is damaged."""
    size, checksum = sums.get(name, list) if len(sums.get(name, list)) == 2 else (None, None)
    if type(size) is not int or not isinstance(checksum, str | None):
        sums.refuse(name, "a size and a checksum")
    return size, checksum


def _files(folder: epath.Path) -> dict[str, tuple[int, str | None]]:
    excluded = (CHECKSUMS_FILE, _CHANGING)
    return {k: v for k, v in list_tree(folder).items() if k.rpartition("/")[2] not in excluded}


def _sha256(path: epath.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
