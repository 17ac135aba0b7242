"""Folders on this machine or in a bucket (`gs://…`), by one kind of path: etils.epath."""

import functools
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from spatial_ssrl_jax.common.errors import GRANT_HINT, UserError, bucket_error

NEEDS_GCS = (
    "gs:// needs the extra [gcs]; install it with pip install 'spatial_ssrl_jax[gcs]', or copy the "
    "files to a local folder"
)
CRC32C = "crc32c:"  # what a bucket's checksums begin with
_AT_ONCE = 16  # files that are read from a bucket together


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a path leads to a bucket, where nothing can be appended to or renamed at once."""
    return "://" in os.fspath(path)


def user_path(place: epath.PathLike) -> epath.Path:
    """The path of a folder that the user named; nothing is asked of a bucket yet.

    Raises:
      UserError: it is neither a local path nor a folder in a `gs://` bucket, or gcsfs is missing.
    """
    text = os.fspath(place)
    if not in_bucket(text):
        return epath.Path(text)
    scheme, _, rest = text.partition("://")
    bucket, _, name = rest.strip("/").partition("/")
    if scheme != "gs" or len(bucket) < 3 or not name:
        raise UserError(f"{text} is no folder in a bucket: give gs://BUCKET/FOLDER.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: {NEEDS_GCS}.")
    import fsspec

    # One backend, TensorFlow there or not; what TensorStore and other processes write is seen at
    # once; errors are said once, by us.
    os.environ.setdefault("EPATH_USE_TF", "false")
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return epath.Path(text)


_PERMISSIONS = ("buckets.get", "objects.create", "objects.delete", "objects.get", "objects.list")
_SECONDS = 20  # that a bucket may take to answer before a run


def check_bucket(folder: epath.Path) -> None:
    """Asks whether a run may read and write a folder, if it is one in a bucket; writes nothing.

    Raises:
      UserError: there is no such bucket, no credentials, or a permission is missing.
    """
    if not in_bucket(folder):
        return
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY

    patience = {"timeout": _SECONDS, "retry": DEFAULT_RETRY.with_timeout(_SECONDS)}
    wanted = [f"storage.{name}" for name in _PERMISSIONS]
    try:
        bucket = storage.Client().get_bucket(folder.parts[2], **patience)  # as Orbax does
        held = bucket.test_iam_permissions(wanted, **patience)
        # TensorStore, which writes the checkpoints, finds credentials by itself.
        _kvstore(folder).read("config.json").result()
    except Exception as error:
        why, mend = bucket_error(error) or (error, "fix that")
        raise UserError(f"{folder} cannot be used ({why}): {mend}.") from error
    missing = [name for name in wanted if name not in held]
    if missing:
        raise UserError(
            f"{folder} cannot be used (without the permission {missing[0]}): {GRANT_HINT}."
        )


def _kvstore(folder: epath.Path):
    import tensorstore

    bucket, *names = folder.parts[2:]
    spec = {"driver": "gcs", "bucket": bucket, "path": "/".join(names) + "/"}
    return tensorstore.KvStore.open(spec).result()


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path; epath would put a local folder in front of a bucket."""
    return epath.Path(path) if in_bucket(path) else epath.Path(path).resolve()


def write_atomic(path: epath.Path, data: str | bytes, partial: epath.Path | None = None) -> None:
    """Replaces a file at once, as a bucket does with every write.

    Args:
      path: the file; its folder is made where it is missing.
      data: what it will hold.
      partial: what it is called until it is written, beside it by default.
    """
    data = data.encode() if isinstance(data, str) else data
    if in_bucket(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial or path.with_suffix(".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def read_files(paths: Iterable[epath.Path]) -> list[bytes]:
    """What many small files hold; in a bucket, where each takes a while, many at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda path: path.read_bytes(), paths))


def list_tree(folder: epath.Path) -> dict[str, tuple[int, str | None]]:
    """Every file below a folder by its path relative to it: bytes, and a bucket's own checksum.

    A folder that is not there holds none.
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
    """A local folder with the same files (not the folders in it): itself, or a copy of what is in
    a bucket, which stays until the process ends.

    Raises:
      UserError: it is not there.
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
    """The copy's path ends as the original's, because messages name it."""
    return Path(copy.name) / folder.partition("://")[2]


@contextmanager
def atomic_folder(folder: epath.PathLike) -> Iterator[Path]:
    """A local folder to fill, which takes the place of `folder` when all went well, else goes.

    To a bucket its files are copied, `config.json` last: a folder that has it is whole.
    """
    if in_bucket(folder):
        with tempfile.TemporaryDirectory() as local:
            yield Path(local)
            _remove(epath.Path(folder))
            _upload(Path(local), epath.Path(folder))
        return
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        _remove(epath.Path(folder))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _upload(local: Path, folder: epath.Path) -> None:
    names = sorted(list_tree(epath.Path(local)))
    for name in sorted(names, key=lambda name: name == "config.json"):
        epath.Path(local / name).copy(folder / name, overwrite=True)


def check_output_folder(folder: epath.PathLike, overwrite: bool, *inputs: epath.PathLike) -> None:
    """Makes sure that `folder` may be written: absent, empty, or `--overwrite` was given.

    Args:
      folder: what will be written.
      overwrite: what it holds may go.
      inputs: what is read; never removed.

    Raises:
      UserError: it holds something, or one of the inputs.
    """
    folder = epath.Path(folder) if in_bucket(folder) else Path(folder)  # epath passes over `a~`
    for path in inputs:
        if absolute(path).is_relative_to(absolute(folder)):
            raise UserError(
                f"{folder} holds what is read ({path}): choose another folder to write."
            )
    holds = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if holds and not overwrite:
        raise UserError(f"{folder} is not empty: choose another folder or give --overwrite.")


def claim_output_folder(folder: epath.PathLike, overwrite: bool, *inputs: epath.PathLike) -> None:
    """`check_output_folder`, and then whatever is there goes."""
    check_output_folder(folder, overwrite, *inputs)
    _remove(epath.Path(folder))


def _remove(folder: epath.Path) -> None:
    if folder.exists():
        folder.rmtree()
