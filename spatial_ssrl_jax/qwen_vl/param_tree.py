"""Parameter trees: nested dicts of arrays, each array known by its path joined with `/`."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import traverse_util

# The leaves are arrays, or what describes them: shapes, shardings, logical axes.
Params = dict[str, Any]

# What a model consists of, as users name it; the embedding and the head belong to `language`.
PARTS = ("vision", "merger", "language")


def part_of(path: str) -> str:
    """The part that a weight belongs to."""
    if path.startswith("vision/"):
        return "merger" if path.startswith("vision/merger/") else "vision"
    return "language"


def flatten_params(params: Params) -> dict[str, Any]:
    """The leaves of a tree by their path, in the tree's order."""
    return dict(traverse_util.flatten_dict(params, sep="/"))


def unflatten_params(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten_params`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def select_params(params: Params, wanted: Callable[[str], bool]) -> Params:
    """The arrays whose path is `wanted`, as a tree; modules left empty are absent."""
    flat = flatten_params(params)
    return unflatten_params({path: leaf for path, leaf in flat.items() if wanted(path)})


def merge_params(first: Params, second: Params) -> Params:
    """Two trees without a common path as one."""
    return unflatten_params(flatten_params(first) | flatten_params(second))
