"""Folders that a command fills: what may be written and emptied, and filling one atomically.

A folder that a command of this package fills holds the file `.spatial_ssrl_jax`; no other folder is
ever emptied. Everything is written inside the folder, which may be a mount point, a link, or below
a folder that cannot be written; the folder itself stays.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath

from etils import epath

from spatial_ssrl_jax.common.errors import UserError, disk_problem
from spatial_ssrl_jax.common.lock import locked
from spatial_ssrl_jax.common.paths import (
    LOCK,
    in_bucket,
    is_partial,
    list_tree,
    partial_name,
    sync,
    write_atomic,
)
from spatial_ssrl_jax.common.text import byte_size

MARKER = ".spatial_ssrl_jax"
_NOT_CONTENT = (MARKER, LOCK, "lost+found")  # the last is in the root of an ext4 disk
_MARKER_TEXT = "This folder was written by spatial_ssrl_jax; --overwrite empties it.\n"


def check_inputs(folder: epath.PathLike, *inputs: epath.PathLike) -> None:
    """Checks that a folder that will be written contains nothing that is read.

    Raises:
      UserError: it contains one of the inputs.
    """
    for path in inputs:
        if _contains(folder, path):
            raise UserError(
                f"{folder} holds what is read ({path}): choose another folder to write."
            )


def check_output_folder(folder: epath.PathLike, overwrite: bool, *inputs: epath.PathLike) -> None:
    """Checks that `folder` may be written: it is absent or empty, or ours with `overwrite` set.

    Args:
      folder: the output.
      overwrite: its present content may be removed.
      inputs: files and folders that are read.

    Raises:
      UserError: it cannot be written, contains an input, or holds something that must stay.
    """
    check_inputs(folder, *inputs)
    folder = _path(folder)
    check_writable(folder)
    if not folder.is_dir() or not _content(folder):
        return
    if not _is_ours(folder):
        raise UserError(
            f"{folder} is not empty, and was not written by this package: choose another folder, "
            "or empty it."
        )
    if not overwrite:
        raise UserError(f"{folder} is not empty: choose another folder or give --overwrite.")
    if not in_bucket(folder):
        here, home = Path(folder).resolve(), Path(os.path.expanduser("~")).resolve()
        if here == home or Path.cwd().resolve().is_relative_to(here):
            raise UserError(
                f"{folder} is your home or holds the working folder, and is never emptied: choose "
                "another folder."
            )


def claim_output_folder(folder: epath.PathLike, overwrite: bool, *inputs: epath.PathLike) -> None:
    """`check_output_folder`, then makes the folder or empties it, and marks it as ours."""
    check_output_folder(folder, overwrite, *inputs)
    folder = _path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder)
    _remove_all(folder, _content(folder) + _leftovers(folder))


def _is_ours(folder: epath.Path | Path) -> bool:
    """Whether a command of this package wrote a folder; early versions' runs have no marker."""
    run = (folder / "config.json", folder / "checkpoints" / "model")
    return (folder / MARKER).exists() or all(path.exists() for path in run)


def mark(folder: epath.Path | Path) -> None:
    """Marks a folder as written by this package, so that `--overwrite` may empty it."""
    if not (folder / MARKER).exists():
        write_atomic(folder / MARKER, _MARKER_TEXT)


@contextmanager
def atomic_folder(
    folder: epath.PathLike,
    overwrite: bool = False,
    inputs: Sequence[epath.PathLike] = (),
    replaces: Callable[[str], bool] | None = None,
) -> Iterator[Path]:
    """A local folder to fill, whose files then replace the content of `folder`.

    `config.json` comes last: a folder that has it is complete. After an error the old content is
    unchanged; what a killed process left is removed by the next one. In a bucket the files are
    copied, and the old ones are removed before.

    Args:
      folder: the output.
      overwrite: its present content may be removed; else it must have none.
      inputs: files and folders that are read.
      replaces: the folder is one that the caller keeps up to date: of its content the names that
        this is true of are replaced, and all others stay.

    Raises:
      UserError: as `check_output_folder`, or the disk is full.
    """
    folder = _path(folder)
    if replaces is None:
        check_output_folder(folder, overwrite, *inputs)
    if in_bucket(folder):
        with tempfile.TemporaryDirectory() as local:
            yield Path(local)
            mark(folder)
            _remove_all(folder, list(filter(replaces, _content(folder))))
            _upload(Path(local), epath.Path(folder))
        return
    folder, is_new = Path(folder), True
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        is_new = False
    try:
        with locked(folder, _say):
            if replaces is None:  # another command may have filled it since
                check_output_folder(folder, overwrite, *inputs)
            with _filled(folder, replaces) as partial:
                yield partial
    finally:
        if is_new and not _content(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@contextmanager
def _filled(folder: Path, replaces: Callable[[str], bool] | None) -> Iterator[Path]:
    mark(folder)
    _remove_all(folder, _leftovers(folder))
    partial, replaced = (Path(partial_name(folder / name)) for name in ("new", "replaced"))
    partial.mkdir()
    try:
        yield partial
        _finish_files(partial)
        replaced.mkdir()
        _replace_content(folder, list(filter(replaces, _content(folder))), partial, replaced)
    except Exception as error:
        if problem := disk_problem(error):
            raise UserError(
                f"{folder} cannot be written ({problem}): free space there, or choose another "
                "folder, and give the same command again."
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _contains(folder: epath.PathLike, path: epath.PathLike) -> bool:
    """Whether a path is a folder or below it, through links and whatever is mounted where."""
    outer, inner = _real(folder), _real(path)
    if inner.is_relative_to(outer):
        return True
    if in_bucket(folder) or in_bucket(path) or not os.path.isdir(folder):
        return False
    found = (place for place in (inner, *inner.parents) if os.path.exists(place))
    return any(os.path.samefile(folder, place) for place in found)


def _real(path: epath.PathLike) -> PurePath:
    return epath.Path(path) if in_bucket(path) else Path(os.path.realpath(path))


def _path(folder: epath.PathLike) -> epath.Path | Path:
    return epath.Path(folder) if in_bucket(folder) else Path(folder)  # epath ignores `a~`


def check_writable(folder: epath.PathLike) -> None:
    """Checks that a folder can be written, or made; a bucket's is not asked.

    Raises:
      UserError: nothing can be made there.
    """
    if in_bucket(folder):
        return
    folder = Path(folder)
    for place in (folder, *folder.absolute().parents):
        if place.is_symlink() and not os.path.exists(place):
            raise UserError(f"{place} is a link to nothing: make its target, or choose another.")
    nearest = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "is not writable" if nearest.is_dir() else "is a file"
        raise UserError(
            f"nothing can be written to {folder} ({nearest} {why}): choose another folder."
        )


def check_space(folder: epath.PathLike, needed: int) -> None:
    """Checks that a folder's disk, unless it is a bucket, has room for so many bytes.

    Raises:
      UserError: it does not.
    """
    if in_bucket(folder):
        return
    place = Path(folder).absolute()
    free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
    if needed > free:
        raise UserError(
            f"{folder} needs {byte_size(needed)}, and its disk has {byte_size(free)} left: free "
            "space there, or choose another folder."
        )


def _content(folder: epath.Path | Path) -> list[str]:
    """Names in a folder that count as content."""
    names = [path.name for path in folder.iterdir()]
    return [n for n in names if n not in _NOT_CONTENT and not is_partial(n)]


def _leftovers(folder: epath.Path | Path) -> list[str]:
    return [path.name for path in folder.iterdir() if is_partial(path.name)]


def _remove_all(folder: epath.Path | Path, names: list[str]) -> None:
    for name in _complete_last(names)[::-1]:
        path = folder / name
        if isinstance(path, Path) and path.is_symlink():
            path.unlink()  # never what it points to
        elif path.is_dir():
            epath.Path(path).rmtree()
        else:
            path.unlink()


def _complete_last(names: list[str]) -> list[str]:
    """Names in order, with the file that says that a folder is complete as the last."""
    return sorted(names, key=lambda name: (name == "config.json", name))


def _finish_files(folder: Path) -> None:
    """Gives every file the mode that the umask allows, and brings all to the disk."""
    mode = folder.stat().st_mode & 0o666  # of a folder made by mkdir
    for place, _, names in os.walk(folder):
        for path in (Path(place) / name for name in names):
            path.chmod(mode)  # safetensors makes files that only their owner reads
            sync(path)
        sync(Path(place))


def _replace_content(folder: Path, old: list[str], new: Path, replaced: Path) -> None:
    """Moves `old` names to `replaced` and the content of `new` in; after an error, both back."""
    names = os.listdir(new)
    old += [n for n in names if n not in old and os.path.lexists(folder / n)]
    try:
        _move(folder, replaced, _complete_last(old)[::-1])
        _move(new, folder, _complete_last(names))
    except BaseException:
        _move(folder, new, [n for n in names if not os.path.lexists(new / n)])
        _move(replaced, folder, _complete_last(os.listdir(replaced)))
        raise
    sync(folder)


def _move(source: Path, target: Path, names: list[str]) -> None:
    for name in names:
        os.replace(source / name, target / name)


def _upload(local: Path, folder: epath.Path) -> None:
    names = sorted(list_tree(epath.Path(local)))
    for name in _complete_last(names):
        epath.Path(local / name).copy(folder / name, overwrite=True)
