"""Bytes that the collectives of a compiled program send, from their groups of devices."""

import math
import re

import numpy as np

_GROUPS_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']*)'(?:=(\d+)|:\(\d+\)(\d+))?")
_GROUPS_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_GROUPS_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{[\d,]+\},?)+)\}")
_GROUPS_LIST = re.compile(r"replica_groups=\{\{([\d,]*)\}")

_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')

_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip


def sent_bytes(
    opcode: str, operand_bytes: float, text: str, slice_size: int | None, slices: int = 1
) -> tuple[float, float]:
    """Bytes that a device sends within its slice, and to other slices; 0 if no collective.

    In a ring of n, an all-gather sends every shard n - 1 times, a reduce-scatter sends n - 1 of n
    shards, and an all-reduce is both. Between slices each device sends what no other one of its
    slice does. The TPU compiler makes that a separate operation: hosts `send` for their devices.

    Args:
      opcode: of an instruction, a collective or not.
      operand_bytes: bytes of its operands.
      text: its attributes.
      slice_size: devices of a slice, numbered consecutively; None is one slice.
      slices: number of slices.
    """
    if opcode == "send" and (found := _BETWEEN_SLICES.search(text)):
        return 0.0, _factor(found[1].lower().replace("_", "-"), slices) * operand_bytes
    kind = opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return 0.0, 0.0
    whole, crossed, local = _factor(kind, group_size(text)) * operand_bytes, 1, 1
    if slice_size is not None:
        groups = group_ids(text)
        crossed = np.unique(groups // slice_size, axis=-1).shape[-1]
        local = max(1, groups.shape[-1] // crossed)
    if crossed == 1:
        return whole, 0.0
    if local == 1:
        return 0.0, whole
    shards = 1 if kind == "all-gather" else local
    return whole, _factor(kind, crossed) * operand_bytes / shards


def _factor(kind: str, size: int) -> float:
    """Bytes that each of `size` devices sends, over the bytes of its operands."""
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    return {"all-gather": size - 1.0, "all-reduce": 2 * (size - 1) / size}.get(
        kind, (size - 1) / size
    )


def group_size(text: str) -> int:
    """Devices of one group of a collective, from its attributes."""
    if found := _GROUPS_MESH.search(text):
        sizes = {name: int(size) for name, size, _ in _MESH_AXIS.findall(found[1]) if size}
        axes = _MESH_AXIS.findall(found[2])
        return math.prod(int(size) if size else sizes[name] for name, _, size in axes)
    if found := _GROUPS_IOTA.search(text):
        return int(found[2])
    if found := _GROUPS_LIST.search(text):
        return len(found[1].split(","))
    return 1


def group_ids(text: str) -> np.ndarray:
    """[groups, size] int, the devices of each group of a collective.

    Of groups given by axes of a mesh only the first one is returned: it crosses as many slices as
    the others.
    """
    if found := _GROUPS_MESH.search(text):
        sizes = {name: int(size) for name, size, _ in _MESH_AXIS.findall(found[1]) if size}
        taken = {name for name, *_ in _MESH_AXIS.findall(found[2])}
        ids = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        return ids[tuple(slice(None) if n in taken else 0 for n in sizes)].reshape(1, -1)
    if found := _GROUPS_IOTA.search(text):
        dims = [int(size) for size in found[3].split(",")]
        ids = np.arange(math.prod(dims)).reshape(dims)
        if found[4]:
            ids = ids.transpose([int(axis) for axis in found[4].split(",")])
        return ids.reshape(int(found[1]), int(found[2]))
    if found := _GROUPS_LISTS.search(text) or _PAIRS.search(text):
        groups = re.findall(r"\{([\d,]+)\}", found[1])
        return np.array([[int(i) for i in group.split(",")] for group in groups])
    return np.zeros((1, 1), int)
