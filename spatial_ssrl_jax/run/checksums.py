"""What tells a whole checkpoint from a damaged one: sizes and SHA-256 of its files."""

import hashlib
import json
import os
from collections.abc import Mapping

from etils import epath

FILE = "checksums.json"
_PIECES, _PIECE = 64, 4096
_CHANGING = "_CHECKPOINT_METADATA"  # Orbax writes to it after the rest is complete


def write_checksums(folder: epath.PathLike) -> None:
    """Leaves `checksums.json` in a folder: size and SHA-256 of every file, however deep.

    In a bucket sizes alone are noted: reading all back would cost as much as the save itself.
    """
    folder = epath.Path(folder)
    text = json.dumps({name: _sum(folder / name) for name in _names(folder)}, indent=1)
    (folder / FILE).write_text(text + "\n")


def damage(folder: epath.PathLike) -> str | None:
    """What is wrong with a folder, or None.

    A folder without `checksums.json`, of an earlier version, is taken as it is.
    """
    folder = epath.Path(folder)
    if not (folder / FILE).exists():
        return None
    try:
        noted = json.loads((folder / FILE).read_text())
    except ValueError:
        return f"{FILE} is damaged"
    missing = sorted(noted.keys() - set(_names(folder)))
    if missing:
        return f"{missing[0]} is missing"
    for name, (size, digest) in noted.items():
        if (folder / name).stat().length != size:
            return f"{name} was cut off or grew"
        if digest and _sum(folder / name)[1] != digest:
            return f"{name} was altered"
    return None


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


def _names(folder: epath.Path) -> list[str]:
    """Paths of the files below a folder, relative to it, in order."""
    found, folders = [], [folder]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                folders.append(path)
            elif path.name not in (FILE, _CHANGING):
                found.append(str(path.relative_to(folder)))
    return sorted(found)


def _sum(path: epath.Path) -> tuple[int, str | None]:
    size = path.stat().length
    if "://" in str(path):
        return size, None
    with open(path, "rb") as file:
        return size, hashlib.file_digest(file, "sha256").hexdigest()
