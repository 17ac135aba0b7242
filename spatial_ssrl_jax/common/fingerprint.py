"""Short hashes of files, which tell whether the files at a path are still the same."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from spatial_ssrl_jax.common.text import utf8

_PARTS, _PART_BYTES = 64, 4096  # of each file whose content is hashed
_THREADS = 16  # a network's file system has a high latency
_GONE = -1  # size of a file that cannot be read


def fingerprint(files: Mapping[str, epath.PathLike], contents: int | None = None) -> str:
    """A hash of files: of their names, their sizes, and parts of their content.

    Args:
      files: the name that is hashed -> the local path.
      contents: files whose content is hashed, evenly over all; None takes every file.
    """
    named = sorted(files.items())
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(lambda item: _size(item[1]), named))
    step = 1 if contents is None else max(1, -(-len(named) // contents))
    digest = hashlib.sha256()
    for number, ((name, path), size) in enumerate(zip(named, sizes, strict=True)):
        digest.update(utf8(f"{name} {size}\n"))
        if number % step == 0 and size != _GONE:
            for part in _parts(path, size):
                digest.update(part)
    return digest.hexdigest()[:16]


def hash_texts(texts: Iterable[str | bytes]) -> str:
    """A hash of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = utf8(text) if isinstance(text, str) else text
        digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]


def _size(path: epath.PathLike) -> int:
    """A regular file's size; a pipe would never end."""
    try:
        return os.path.getsize(path) if os.path.isfile(path) else _GONE
    except OSError:
        return _GONE


def _parts(path: epath.PathLike, size: int) -> Iterable[bytes]:
    """Parts of a file, evenly from its start to its end."""
    try:
        with open(path, "rb") as file:
            for i in range(_PARTS):
                file.seek(i * max(size - _PART_BYTES, 0) // (_PARTS - 1))
                yield file.read(_PART_BYTES)
    except OSError:
        return
