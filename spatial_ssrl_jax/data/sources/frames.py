"""Frames inside of HDF5 files, each an image with its depth, as NYU Depth v2 is handed out.

`nyu_depth_v2_labeled.mat` holds many, in MATLAB's order: `images` [N, 3, W, H] and `depths`
[N, W, H]. The Hub's copies are files of one: `rgb` [3, H, W] and `depth` [H, W]. Images are uint8,
depth is in metres. One frame is read at a time.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import h5py
import numpy as np

from spatial_ssrl_jax.common.errors import BadImage
from spatial_ssrl_jax.common.fingerprint import fingerprint
from spatial_ssrl_jax.common.reading import READING, Reading
from spatial_ssrl_jax.data.images import check_pixels
from spatial_ssrl_jax.data.sources.depth_files import check_plane, guarded, plane
from spatial_ssrl_jax.data.sources.depthmap import DepthTarget, below_limit, fit_depth
from spatial_ssrl_jax.data.sources.hdf5 import check_stored, open_hdf5
from spatial_ssrl_jax.tasks.record import Record

Value = TypeVar("Value")

ENDINGS = (".mat", ".h5", ".hdf5")
_TRIED = 5  # files of one frame that are opened to know their kind
_HASHED = 64  # files whose content is hashed


@dataclass(frozen=True)
class FrameSource:
    """Frames of HDF5 files below a folder.

    Attributes:
      spec: the SPEC as the user wrote it.
      root: the folder.
      files: paths relative to `root` with `/`.
      counts: number of frames in each file; None for files of one frame.
      reading: how depth is read.
    """

    spec: str
    root: str
    files: tuple[str, ...]
    counts: tuple[int, ...] | None = None
    reading: Reading = READING
    has_depth: bool = True

    @property
    def has_distances(self) -> bool:
        return self.reading.depth != "relative-inverse"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The folder, and the files where links point to."""
        files = {os.path.realpath(os.path.join(self.root, file)) for file in self.files}
        return (self.root, *sorted(files))

    def fingerprint(self) -> str:
        return fingerprint({name: os.path.join(self.root, name) for name in self.files}, _HASHED)

    def __len__(self) -> int:
        return len(self.files) if self.counts is None else sum(self.counts)

    def name(self, index: int) -> str:
        file, frame = self._place(index)
        return file if frame is None else f"{file}#{frame}"

    def size(self, index: int) -> tuple[int, int]:
        return self._read(index, lambda frame: frame.size)

    def __getitem__(self, index: int) -> Record:
        name = self.name(index)
        path = os.path.join(self.root, name)
        image, depth = self._read(index, lambda frame: frame.read())
        target = DepthTarget(image.shape[:2], reading=self.reading)
        depth = fit_depth(depth.astype(np.float32), target, path, below_limit(depth))
        return Record(image, depth, name, self.spec, path if self.counts else f"{path}#rgb")

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.counts or ()))

    def _place(self, index: int) -> tuple[str, int | None]:
        """A record's file, and its frame in a file of many."""
        index = range(len(self))[index]  # negative from the end; IndexError beyond
        if self.counts is None:
            return self.files[index], None
        at = bisect_right(self._ends, index)
        return self.files[at], index - (self._ends[at] - self.counts[at])

    def _read(self, index: int, of: Callable[["_Frame"], Value]) -> Value:
        file, number = self._place(index)
        path = os.path.join(self.root, file)

        def read() -> Value:
            with open_hdf5(path) as opened:
                return of(_Frame(opened, number, path))

        return guarded(read, path)


class _Frame:
    """One frame of an open file, whose shapes and types are checked.

    Attributes:
      size: (height, width).
    """

    def __init__(self, file: h5py.File, number: int | None, path: str):
        names = ("rgb", "depth") if number is None else ("images", "depths")
        self._number = number
        self._image, self._depth = (_data_set(file, name, path) for name in names)
        shape, depth = self._image.shape, self._depth.shape
        if number is None:
            self._axes = (1, 2, 0) if shape[:1] == (3,) else (0, 1, 2)
        else:
            self._axes, shape, depth = (2, 1, 0), shape[1:], depth[:0:-1]
        if len(shape) != 3 or shape[self._axes[2]] != 3 or self._image.dtype != np.uint8:
            what = f"{self._image.dtype} {list(self._image.shape)}"
            raise BadImage(f"{path}: '{names[0]}' holds {what}; expected images in uint8 RGB.")
        self.size = (shape[self._axes[0]], shape[self._axes[1]])
        check_pixels(self.size, path)
        check_plane(depth, self._depth.dtype, path)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Image [H, W, 3] uint8, and depth [H, W] as stored."""
        at = () if self._number is None else self._number
        image, depth = self._image[at].transpose(self._axes), self._depth[at]
        return np.array(image, order="C"), plane(depth) if self._number is None else depth.T


def open_frames(
    spec: str, root: str, files: Sequence[str], reading: Reading = READING
) -> FrameSource | None:
    """The frames of the HDF5 files among `files`; None where there are none."""
    many = {file: _count(root, file) for file in _ending(files, *ENDINGS[:1])}
    singles = _ending(files, *ENDINGS[1:])
    if not any(many.values()):
        if any(_is_frame(root, file) for file in singles[:_TRIED]):
            return FrameSource(spec, root, tuple(singles), None, reading)
        if singles and _count(root, singles[0]):
            many = {file: _count(root, file) for file in singles}
    many = {file: count for file, count in many.items() if count}
    if not many:
        return None
    return FrameSource(spec, root, tuple(many), tuple(many.values()), reading)


def _ending(files: Sequence[str], *endings: str) -> list[str]:
    return [file for file in files if file.lower().endswith(endings)]


def _count(root: str, file: str) -> int:
    """Number of frames in a file of many; 0 in any other."""
    path = os.path.join(root, file)

    def read() -> int:
        with open_hdf5(path) as opened:
            return len(_data_set(opened, "images", path))

    try:
        return guarded(read, path)
    except BadImage:
        return 0


def _is_frame(root: str, file: str) -> bool:
    path = os.path.join(root, file)

    def read() -> bool:
        with open_hdf5(path) as opened:
            return "rgb" in opened and "depth" in opened

    try:
        return guarded(read, path)
    except BadImage:
        return False


def _data_set(file: h5py.File, name: str, path: str) -> h5py.Dataset:
    values = file.get(name)
    if not isinstance(values, h5py.Dataset):
        raise BadImage(f"{path}: holds no data set '{name}'.")
    check_stored(values, path)
    return values
