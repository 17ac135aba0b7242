"""HDF5 files (`.h5`, `.hdf5`, MATLAB's `.mat` since 7.3), opened so that no other file is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
from h5py import h5l  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

from spatial_ssrl_jax.common.errors import BadImage
from spatial_ssrl_jax.data.images import check_pixels


@contextmanager
def open_hdf5(path: str) -> Iterator[h5py.File]:
    """Opens a file to read; raises `BadImage` for a link that points out of it."""
    with h5py.File(path, "r") as file:
        # Before any object is opened: opening a link into another file would read that file.
        if file.id.links.visit(_leaves_file, info=True):
            raise BadImage(f"{path}: has a link to another file; copy its depth into this one.")
        yield file


def data_sets(file: h5py.File, known: str) -> dict[str, h5py.Dataset]:
    """The data set at a file's top with the known name; without one all that are there."""
    names = [known] if isinstance(file.get(known), h5py.Dataset) else list(file)
    items = {name: file[name] for name in names}
    return {name: item for name, item in items.items() if isinstance(item, h5py.Dataset)}


def check_stored(values: h5py.Dataset, path: str) -> None:
    """Raises `BadImage` for values in other files, or in chunks that are too large to read."""
    if values.is_virtual or values.external:
        raise BadImage(f"{path}: keeps its values in other files; copy them into this one.")
    check_pixels(values.chunks or (), path)  # a chunk is read whole


def _leaves_file(name: bytes, link: Any) -> bool | None:
    """Whether a link points out of its file; None, which goes on to the next, where it does not."""
    return link.type not in (h5l.TYPE_HARD, h5l.TYPE_SOFT) or None
