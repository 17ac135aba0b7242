"""Paths in the rows of question files: they stay inside the folder that the user named.

What a row names is copied into pages that people publish, and a file may come from anyone. Only the
folders of the released images may be beside that folder, or above it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

# The folders that the released archives unpack to.
IMAGE_FOLDERS = ("images", "coldstart_SFT_images")
_ABOVE = (".", "..", "../..")  # where they are looked for, from the folder of the question file
_SAMPLE = 64  # of a file's paths that are looked for

ALLOW_HINT = (
    "put it inside, name a folder that holds both, or allow it (--allow-outside-paths; for a run "
    "--config.data.allow_outside_paths=true)"
)


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path is below a folder by its words alone: links below it may lead anywhere."""
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    return os.path.commonpath([path, folder]) == folder


def complete_path(folder: str | os.PathLike[str], path: str) -> str:
    """A row's path, relative to its file's folder, as a path that is the same by its words.

    Without this a `..` after a link would lead to the parent of what the link points to.
    """
    whole = os.path.join(folder, path)
    return os.path.normpath(whole) if ".." in path.split("/") else whole


@dataclass(frozen=True)
class RowPaths:
    """Where the paths in the rows of one question file lead.

    Attributes:
      folder: of the file.
      base: the folder that holds the released images' folder, where the rows' paths are looked for
        in it; "" where they are relative to `folder`.
      seen: a folder in which some of them were found; "" where none was.
    """

    folder: str
    base: str = ""
    seen: str = ""

    @classmethod
    def find(cls, folder: str, paths: Sequence[str], inside: str | None) -> "RowPaths":
        """Looks for some of a file's images where its rows say, then where the authors put them.

        Args:
          folder: of the question file.
          paths: in its rows, none of them empty.
          inside: the folder that the user named, outside of which no row may say; None allows any.
        """
        sample = list(dict.fromkeys(paths))
        sample = sample[:: -(-len(sample) // _SAMPLE) or 1]
        as_written = [complete_path(folder, path) for path in sample]
        as_written = [path for path in as_written if inside is None or is_inside(path, inside)]
        tails, places = list(filter(None, map(_released_path, sample))), {"": as_written}
        for up in _ABOVE:
            base = os.path.normpath(os.path.join(os.path.abspath(folder), up))
            places[base] = [os.path.join(base, tail) for tail in tails]
        for base, tried in places.items():
            if found := [os.path.dirname(path) for path in tried if os.path.isfile(path)]:
                return cls(folder, base, os.path.commonpath(map(os.path.abspath, found)))
        return cls(folder)

    def complete(self, path: str) -> str:
        """The whole path of an image."""
        tail = _released_path(path) if self.base else None
        return os.path.join(self.base, tail) if tail else complete_path(self.folder, path)

    def holds(self, path: str) -> bool:
        """Whether a whole path is in a folder of released images that was found."""
        return bool(self.base) and any(
            is_inside(path, os.path.join(self.base, name)) for name in IMAGE_FOLDERS
        )


def _released_path(path: str) -> str | None:
    """A path from the released images' folder on, whatever is before it; None where it climbs."""
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    if ".." in parts:
        return None
    starts = [i for i, part in enumerate(parts) if part in IMAGE_FOLDERS]
    return "/".join(parts[starts[-1] :] if starts else (IMAGE_FOLDERS[0], *parts))
