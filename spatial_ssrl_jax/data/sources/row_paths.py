"""Paths in the rows of question files: they stay inside the folder that the user named.

What a row names is copied into pages that people publish, and a file may come from anyone.
"""

import os

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
