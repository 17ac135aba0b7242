"""Parameter trees: nested dicts of arrays, each array known by its path joined with `/`."""

from collections.abc import Callable
from typing import Any

from flax import traverse_util

Params = dict[str, Any]

# What a model consists of, as users name it; the embedding and the head belong to `language`.
PARTS = ("vision", "merger", "language")


def part_of(path: str) -> str:
    """The part that a weight belongs to."""
    if path.startswith("vision/"):
        return "merger" if path.startswith("vision/merger/") else "vision"
    return "language"


def select_params(params: Params, wanted: Callable[[str], bool]) -> Params:
    """The arrays whose path is `wanted`, as a tree; modules left empty are absent."""
    flat = traverse_util.flatten_dict(params, sep="/")
    kept = {path: leaf for path, leaf in flat.items() if wanted(path)}
    return traverse_util.unflatten_dict(kept, sep="/")


def merge_params(first: Params, second: Params) -> Params:
    """Two trees without a common path as one."""
    flat = [traverse_util.flatten_dict(tree, sep="/") for tree in (first, second)]
    return traverse_util.unflatten_dict(flat[0] | flat[1], sep="/")
