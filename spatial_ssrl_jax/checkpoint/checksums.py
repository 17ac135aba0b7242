"""What tells a whole checkpoint from a damaged one: sizes and checksums of its files."""

import hashlib
import json
import os
from collections.abc import Mapping

from etils import epath

from spatial_ssrl_jax.common.paths import CRC32C, in_bucket, list_tree

FILE = "checksums.json"
_PIECES, _PIECE = 64, 4096
_CHANGING = "_CHECKPOINT_METADATA"  # Orbax writes to it after the rest is complete


def write_checksums(folder: epath.PathLike) -> None:
    """Leaves `checksums.json` in a folder: size and SHA-256 of every file, however deep.

    Of a file in a bucket it holds the cloud's own CRC32C, since reading all back would cost as much
    as the save itself.
    """
    folder = epath.Path(folder)
    sums = {
        name: (size, checksum or _sha256(folder / name))
        for name, (size, checksum) in sorted(_files(folder).items())
    }
    (folder / FILE).write_text(json.dumps(sums, indent=1) + "\n")


def find_damage(folder: epath.PathLike) -> str | None:
    """What is wrong with a folder, or None.

    A folder without `checksums.json`, of an earlier version, is taken as it is. Sizes alone are
    compared where a folder was copied into a bucket or out of one.
    """
    folder = epath.Path(folder)
    if not (folder / FILE).exists():
        return None
    try:
        noted = json.loads((folder / FILE).read_text())
    except ValueError:
        return f"{FILE} is damaged"
    found = _files(folder)
    missing = sorted(noted.keys() - found.keys())
    if missing:
        return f"{missing[0]} is missing"
    for name, (size, checksum) in noted.items():
        if found[name][0] != size:
            return f"{name} was cut off or grew"
        alike = checksum and checksum.startswith(CRC32C) == in_bucket(folder)
        if alike and checksum != (found[name][1] or _sha256(folder / name)):
            return f"{name} was altered"
    return None


def _files(folder: epath.Path) -> dict[str, tuple[int, str | None]]:
    left_out = (FILE, _CHANGING)
    return {k: v for k, v in list_tree(folder).items() if k.rpartition("/")[2] not in left_out}


def fingerprint(files: Mapping[str, epath.PathLike]) -> str:
    """Tells files from others by their names, their sizes and pieces spread over each of them.

    Args:
      files: paths of local files by the names that count.
    """
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        size = os.path.getsize(path)
        digest.update(f"{name} {size}\n".encode())
        with open(path, "rb") as file:
            for piece in range(_PIECES):
                file.seek(piece * max(size - _PIECE, 0) // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]


def _sha256(path: epath.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
