"""Folders on this machine or in a bucket (`gs://…`), both as `etils.epath` paths."""

import functools
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from etils import epath

from spatial_ssrl_jax.common.errors import GRANT_HINT, UserError, bucket_error
from spatial_ssrl_jax.common.text import error_line

if TYPE_CHECKING:
    import tensorstore

NEEDS_GCS = (
    "gs:// needs the extra [gcs]; install it with pip install 'spatial_ssrl_jax[gcs]', or copy the "
    "files to a local folder"
)
LOCK = ".lock"  # of a folder that one process writes, see `common.lock`
CRC32C = "crc32c:"  # prefix of a bucket's own checksums
_READ_THREADS = 16


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a path is in a bucket, where files have no append and no atomic rename."""
    return "://" in os.fspath(path)


def user_path(place: epath.PathLike) -> epath.Path:
    """The path of a folder that the user named; sends no request to a bucket.

    Raises:
      UserError: it is neither a local path nor a folder in a `gs://` bucket, or gcsfs is missing.
    """
    text = os.fspath(place)
    if not in_bucket(text):
        return epath.Path(os.path.expanduser(text))
    scheme, _, rest = text.partition("://")
    bucket, _, name = rest.strip("/").partition("/")
    if scheme != "gs" or len(bucket) < 3 or not name:
        raise UserError(f"{text} is no folder in a bucket: give gs://BUCKET/FOLDER.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: {NEEDS_GCS}.")
    from fsspec.config import conf

    # One backend, with or without TensorFlow; no stale listings, since TensorStore and other
    # processes write too; errors are reported once, by this package.
    os.environ.setdefault("EPATH_USE_TF", "false")
    conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return epath.Path(text)


_PERMISSIONS = ("buckets.get", "objects.create", "objects.delete", "objects.get", "objects.list")
_SECONDS = 20  # timeout of the check before a run


def check_bucket(folder: epath.Path) -> None:
    """Checks that a run may read and write a folder, if it is in a bucket; writes nothing.

    Raises:
      UserError: there is no such bucket, no credentials, or a permission is missing.
    """
    if not in_bucket(folder):
        return
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY

    limits = {"timeout": _SECONDS, "retry": DEFAULT_RETRY.with_timeout(_SECONDS)}
    wanted = [f"storage.{name}" for name in _PERMISSIONS]
    try:
        bucket = storage.Client().get_bucket(folder.parts[2], **limits)  # as Orbax does
        held = bucket.test_iam_permissions(wanted, **limits)
        # TensorStore, which writes the checkpoints, finds credentials by itself.
        _kvstore(folder).read("config.json").result()
    except Exception as error:
        why, fix = bucket_error(error) or (error_line(error), "fix that")
        raise UserError(f"{folder} cannot be used ({why}): {fix}.") from error
    missing = [name for name in wanted if name not in held]
    if missing:
        raise UserError(
            f"{folder} cannot be used (without the permission {missing[0]}): {GRANT_HINT}."
        )


def _kvstore(folder: epath.Path) -> "tensorstore.KvStore":
    import tensorstore

    bucket, *names = folder.parts[2:]
    spec = {"driver": "gcs", "bucket": bucket, "path": "/".join(names) + "/"}
    return tensorstore.KvStore.open(spec).result()


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path; `epath.resolve` would put the working folder in front of a bucket."""
    return epath.Path(path) if in_bucket(path) else epath.Path(path).resolve()


def write_atomic(path: epath.Path | Path, data: str | bytes) -> None:
    """Replaces a file atomically, as a bucket does with every write; makes a missing folder.

    The data reach the disk before the file has its name.
    """
    data = data.encode() if isinstance(data, str) else data
    if in_bucket(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(partial_name(path))
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def partial_name(path: epath.Path | Path) -> epath.Path | Path:
    """Where a file or folder is written before it has its name."""
    return path.with_name(f".{path.name}.partial")


def is_partial(name: str) -> bool:
    """Whether a name is one of `partial_name`: what an interrupted write left."""
    return name.startswith(".") and name.endswith(".partial")


def check_regular(path: epath.PathLike, fix: str) -> None:
    """Refuses what is no file: a folder, or a pipe, which would be waited for without an end.

    Args:
      path: a missing one, and all in a bucket, are let pass.
      fix: how the error ends.

    Raises:
      UserError: it is no file.
    """
    if not in_bucket(path) and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{os.fspath(path)} is a folder or a pipe, not a file: {fix}.")


def sync(path: Path) -> None:
    """Returns when a file, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # file systems without it for folders refuse
            raise
    finally:
        os.close(descriptor)


def read_files(paths: Iterable[epath.Path], skip: bool = False) -> list[bytes]:
    """The content of many small files, read in parallel: a bucket has a high latency.

    Args:
      paths: the files.
      skip: one that cannot be read counts as empty.

    Raises:
      UserError: one is no file.
      OSError: one cannot be read.
    """

    def read(path: epath.Path) -> bytes:
        try:
            check_regular(path, "remove it")
            return path.read_bytes()
        except (UserError, OSError):
            if not skip:
                raise
            return b""

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return list(pool.map(read, paths))


def list_tree(folder: epath.Path) -> dict[str, tuple[int, str | None]]:
    """Every file below a folder: relative path -> (size in bytes, a bucket's own checksum).

    Empty for a missing folder; the checksum of a local file is None.
    """
    found = {}
    if in_bucket(folder):
        import fsspec

        files = fsspec.filesystem("gcs").find(os.fspath(folder), detail=True)
        start = len(os.fspath(folder).removeprefix("gs://").rstrip("/")) + 1
        return {
            name[start:]: (info["size"], CRC32C + info["crc32c"]) for name, info in files.items()
        }
    for place, _, names in os.walk(folder):
        for path in (Path(place) / name for name in names):
            found[str(path.relative_to(folder))] = (path.stat().st_size, None)
    return found


def local_copy(folder: epath.Path, pattern: str = "*") -> Path:
    """The folder itself, or a local copy of a bucket's, which is removed when the process ends.

    Args:
      folder: only its own files are copied, not those of its subfolders.
      pattern: glob of the files to copy.

    Raises:
      UserError: the bucket has no such folder.
    """
    if not in_bucket(folder):
        return Path(folder)
    text = os.fspath(folder)
    return _named(_copy_of(text, pattern), text)


@functools.cache
def _copy_of(folder: str, pattern: str) -> tempfile.TemporaryDirectory:
    files = [path for path in epath.Path(folder).glob(pattern) if not path.is_dir()]
    if not files:
        raise UserError(f"{folder} does not exist or is empty: check the bucket and the name.")
    copy = tempfile.TemporaryDirectory()
    _named(copy, folder).mkdir(parents=True)
    for path in files:
        path.copy(_named(copy, folder) / path.name)
    return copy


def _named(copy: tempfile.TemporaryDirectory, folder: str) -> Path:
    """The copy's path ends as the original's, because messages quote it."""
    return Path(copy.name) / folder.partition("://")[2]
