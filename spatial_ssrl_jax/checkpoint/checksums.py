"""Sizes and checksums of a checkpoint's files, which tell whether it is damaged."""

import hashlib
import json

from etils import epath

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

    A folder without `checksums.json` is not checked. Only sizes are compared where a folder was
    copied into a bucket or out of one.
    """
    folder = epath.Path(folder)
    if not (folder / CHECKSUMS_FILE).exists():
        return None
    try:
        expected = json.loads((folder / CHECKSUMS_FILE).read_text())
    except ValueError:
        return f"{CHECKSUMS_FILE} is damaged"
    found = _files(folder)
    missing = sorted(expected.keys() - found.keys())
    if missing:
        return f"{missing[0]} is missing"
    for name, (size, checksum) in expected.items():
        if found[name][0] != size:
            return f"{name} was truncated or grew"
        comparable = checksum and checksum.startswith(CRC32C) == in_bucket(folder)
        if comparable and checksum != (found[name][1] or _sha256(folder / name)):
            return f"{name} was altered"
    return None


def _files(folder: epath.Path) -> dict[str, tuple[int, str | None]]:
    excluded = (CHECKSUMS_FILE, _CHANGING)
    return {k: v for k, v in list_tree(folder).items() if k.rpartition("/")[2] not in excluded}


def _sha256(path: epath.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
