"""Sources that read a folder: the listing of its files, and a source over them."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from PIL import features

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.fingerprint import fingerprint
from spatial_ssrl_jax.common.outputs import MARKER
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.common.retry import with_retries
from spatial_ssrl_jax.data.images import HEIF_EXTRA, image_size, open_oriented_image, reads_heif
from spatial_ssrl_jax.data.sources.depth_files import DEPTH_ENDINGS
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget
from spatial_ssrl_jax.tasks.record import Record

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_HEIF = reads_heif, f"pip install '{HEIF_EXTRA}'"
_BY_PLUGIN = {  # whether Pillow reads it here, and what helps where not
    ".avif": (lambda: features.check("avif"), "pip install -U pillow"),
    ".heic": _HEIF,
    ".heif": _HEIF,
}
_DATA_SUFFIXES = (*_SUFFIXES, *_BY_PLUGIN, *DEPTH_ENDINGS)
_HASHED = 64  # files whose content is hashed


@dataclass(frozen=True)
class FileSource:
    """Images below a folder, each with a depth file where the kind has one.

    Attributes:
      spec: the SPEC as the user wrote it.
      root: the folder.
      files: the images' paths relative to `root` with `/`, sorted; they are the records' names.
      depth_of: (image's path, target) -> [H, W] float32, NaN where invalid, raising `BadImage`;
        None for images without depth. A module's function, so that it pickles.
      reading: how the files are read.
      notes: what the listing leaves out.
      depth_files: the depth files' paths relative to `root`, where they are known.
    """

    spec: str
    root: str
    files: tuple[str, ...]
    depth_of: Callable[[str, DepthTarget], np.ndarray] | None = None
    reading: Reading = READING
    notes: tuple[str, ...] = ()
    depth_files: tuple[str, ...] = ()

    @property
    def has_depth(self) -> bool:
        return self.depth_of is not None

    @property
    def has_distances(self) -> bool:
        return self.has_depth and self.reading.depth != "relative-inverse"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The folder, and what links below it point to."""
        files = [os.path.join(self.root, file) for file in (*self.files, *self.depth_files)]
        linked = {os.path.realpath(file) for file in files if os.path.islink(file)}
        folders = set(map(os.path.realpath, {os.path.dirname(file) for file in files}))
        return (self.root, *sorted(folders | linked))

    def fingerprint(self) -> str:
        files = self.files if self.depth_of is None else filter(_is_data, _walk(self.root))
        return fingerprint({name: os.path.join(self.root, name) for name in files}, _HASHED)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def size(self, index: int) -> tuple[int, int]:
        width, height = image_size(os.path.join(self.root, self.files[index]), listed=True)
        return height, width

    def __getitem__(self, index: int) -> Record:
        name = self.files[index]
        path = os.path.join(self.root, name)
        image, orientation = open_oriented_image(path, transparency=self.reading.transparency)
        target = DepthTarget(image.shape[:2], orientation, self.reading)
        depth = None if self.depth_of is None else self.depth_of(path, target)
        return Record(image, depth, name, self.spec, path, turned=orientation != 1)


def list_files(spec: str, path: str, layout: str) -> tuple[str, list[str]]:
    """Lists all files below a folder, through links too; names that begin with a dot are skipped.

    Args:
      spec: the SPEC, for errors.
      path: the folder; `~` is expanded.
      layout: of the files that the kind expects, for errors.

    Returns:
      The folder, and paths relative to it with `/`, sorted.

    Raises:
      UserError: there is no such folder, or a folder cannot be read.
    """
    root = os.path.expanduser(path)
    _wait_for(root)
    if not path or not os.path.isdir(root):
        problem = "is a file, not a folder" if os.path.isfile(root) else "there is no such folder"
        problem = problem if path else "the folder's path is missing"
        raise UserError(f"source '{spec}': {problem}; expected {layout}.")
    try:
        return root, with_retries(lambda: sorted(_walk(root)), root, listed=False)
    except OSError as error:
        where, why = error.filename or root, error.strerror or str(error)
        raise UserError(f"source '{spec}': cannot read the folder {where} ({why}).") from error


def require_images(
    spec: str, root: str, files: Sequence[str], layout: str, notes: Sequence[str] = ()
) -> tuple[str, ...]:
    """The files as a tuple; raises `UserError` naming the expected layout if there are none."""
    if not files:
        what = "; ".join([f"found no image below {root}", *notes])
        raise UserError(f"source '{spec}': {what}; expected {layout}.")
    return tuple(files)


def is_image(file: str) -> bool:
    """Whether a file's name ends as that of an image which Pillow reads here."""
    ending = os.path.splitext(file)[1].lower()
    return ending in _SUFFIXES or (ending in _BY_PLUGIN and _BY_PLUGIN[ending][0]())


def unreadable(files: Sequence[str]) -> tuple[str, ...]:
    """Notes of images in formats that Pillow does not read here."""
    notes: list[str] = []
    for ending, (is_read, fix) in _BY_PLUGIN.items():
        found = [file for file in files if file.lower().endswith(ending)]
        if found and not is_read():
            notes += (f"{note}; {fix}" for note in left_out(found, f"{ending} images"))
    return tuple(notes)


def left_out(files: Sequence[str], what: str) -> tuple[str, ...]:
    """A note of files that are left out, if there are any."""
    return (f"{what} left out: {len(files):,}, for example {files[0]}",) if files else ()


def _is_data(file: str) -> bool:
    return file.lower().endswith(_DATA_SUFFIXES)


def _wait_for(root: str) -> None:
    """Returns when a folder is available, or is known not to exist."""
    with suppress(OSError):
        with_retries(lambda: os.stat(root), root, listed=False)


def _walk(root: str) -> Iterator[str]:
    def refuse(error: OSError) -> NoReturn:
        raise error

    seen = set()  # real folders, so that a link to a parent ends the walk
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        # What this package writes into the folder, such as a run's rollouts, is none of its images.
        subfolders[:] = sorted(
            s
            for s in subfolders
            if not s.startswith(".") and not os.path.exists(os.path.join(folder, s, MARKER))
        )
        prefix = "" if folder == root else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        yield from (prefix + name for name in names if not name.startswith("."))
