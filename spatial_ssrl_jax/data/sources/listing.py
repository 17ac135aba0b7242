"""The files below a folder, to be found by folder and by name."""

import os
from collections.abc import Iterator, Sequence

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.retry import with_retries
from spatial_ssrl_jax.data.sources.files import is_image

_TEXT_BYTES = 64 << 20  # of a text file, at most


class Listing:
    """Files below a folder. A folder in it ends with `/`; the top itself is "".

    Args:
      root: the folder.
      files: paths relative to it with `/`.

    Attributes:
      root: the folder.
      folders: of each folder with files: stem (a name without its ending) -> endings.
    """

    def __init__(self, root: str, files: Sequence[str]):
        self.root = root
        self.folders: dict[str, dict[str, list[str]]] = {}
        for file in files:
            at = file.rfind("/") + 1
            stem, ending = os.path.splitext(file[at:])
            self.folders.setdefault(file[:at], {}).setdefault(stem, []).append(ending)

    def __contains__(self, file: str) -> bool:
        at = file.rfind("/") + 1
        stem, ending = os.path.splitext(file[at:])
        return ending in self.folders.get(file[:at], {}).get(stem, ())

    def named(self, name: str) -> list[str]:
        """Folders of a name, in any case."""
        return [folder for folder in self.folders if base(folder).lower() == name]

    def entries(self, folder: str, endings: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """(stem, path) of a folder's files with one of the endings, in any case."""
        for stem, found in self.folders.get(folder, {}).items():
            for ending in found:
                if ending.lower() in endings:
                    yield stem, f"{folder}{stem}{ending}"

    def images(self, folder: str) -> Iterator[tuple[str, str]]:
        """(stem, path) of a folder's images."""
        for stem, found in self.folders.get(folder, {}).items():
            for ending in found:
                if is_image(f"{stem}{ending}"):
                    yield stem, f"{folder}{stem}{ending}"

    def find(self, folder: str, stem: str, endings: tuple[str, ...]) -> str | None:
        """The path of a folder's file by its stem, with the first of the endings that is there."""
        found = self.folders.get(folder, {}).get(stem, ())
        by_case = {ending.lower(): ending for ending in found}
        ending = next((by_case[ending] for ending in endings if ending in by_case), None)
        return None if ending is None else f"{folder}{stem}{ending}"

    def lines(self, file: str) -> list[str]:
        """The lines of a text file; none of what is no text file or too large.

        Raises:
          UserError: it cannot be read.
        """
        path = os.path.join(self.root, file)
        try:
            if not os.path.isfile(path) or os.path.getsize(path) > _TEXT_BYTES:
                return []
            return with_retries(lambda: _read(path), path)
        except OSError as error:
            why = error.strerror or str(error)
            raise UserError(f"{path} cannot be read ({why}): fix or remove it.") from error


def parent(folder: str) -> str:
    """The folder that holds a folder; "" is the top, and holds itself."""
    return folder[: folder[:-1].rfind("/") + 1]


def base(folder: str) -> str:
    """A folder's own name."""
    return folder[len(parent(folder)) : -1]


def _read(path: str) -> list[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().splitlines()
