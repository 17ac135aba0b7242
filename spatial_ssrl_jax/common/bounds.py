"""Ranges of settings, declared beside their fields and checked for all of them in one place."""

import dataclasses
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Bounds:
    """The range of a number, or of every item of a tuple or dict; never NaN or infinite.

    Attributes:
      min: the smallest value, or None.
      max: the largest value, or None.
      above: what a value must exceed, or None.
      below: what a value must be less than, or None.
      filled: a tuple has an item, and a dict of weights one above 0.
    """

    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    filled: bool = False

    def allows(self, value: float) -> bool:
        """Whether a number is in the range."""
        return (
            abs(value) <= sys.float_info.max  # neither NaN nor infinite, also as a float
            and (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """The range in words, such as `at least 0 and below 1`."""
        limits = {
            "at least": self.min,
            "above": self.above,
            "at most": self.max,
            "below": self.below,
        }
        named = [
            f"{words} {limit:,}" if isinstance(limit, int) else f"{words} {limit:g}"
            for words, limit in limits.items()
            if limit is not None
        ]
        return " and ".join(named) or "a finite number"


Count = Annotated[int, Bounds(min=1)]
Whole = Annotated[int, Bounds(min=0)]
Positive = Annotated[float, Bounds(above=0)]
NonNegative = Annotated[float, Bounds(min=0)]
Fraction = Annotated[float, Bounds(min=0, max=1)]
Widths = Annotated[tuple[int, ...], Bounds(min=1, filled=True)]
Weights = Annotated[dict[str, float], Bounds(min=0, filled=True)]


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def invalid_values(node: Any, prefix: str = "") -> Iterator[str]:
    """What is wrong with each value below a dataclass: another type, or outside its `Bounds`.

    Args:
      node: a dataclass whose fields are annotated, or a dict of such.
      prefix: of the keys in the sentences.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            yield from invalid_values(value, f"{prefix}{key}.")
        return
    for key, hint in typing.get_type_hints(type(node), include_extras=True).items():
        value, name = getattr(node, key), f"{prefix}{key}"
        bounds = next((x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Bounds)), None)
        kind = typing.get_args(hint)[0] if bounds else hint
        is_section = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        if is_section and not isinstance(value, kind):
            yield f"{name} must be a {kind.__name__}, not {type(value).__name__}"
        elif dataclasses.is_dataclass(value) or (isinstance(value, dict) and not bounds):
            yield from invalid_values(value, f"{name}.")
        else:
            yield from _problems(kind, bounds, name, value)


def _problems(kind: Any, bounds: Bounds | None, name: str, value: Any) -> Iterator[str]:
    """What is wrong with a single value, a tuple of values or a dict of values."""
    container, inner = typing.get_origin(kind), typing.get_args(kind)
    if container not in (tuple, dict):
        yield from _problem(kind, bounds, f"{name}={value}", value)
        return
    if not isinstance(value, container):
        yield f"{name}={value} must be a {container.__name__}"
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _problem(inner[1], bounds, f"{name}.{key}={item}", item)
        if bounds and bounds.filled and not any(value.values()):
            yield f"{name} are all 0: give one of {', '.join(value)} a weight above 0"
        return
    for item in value:
        yield from _problem(inner[0], bounds, f"{name}={value}: {item}", item)
    if bounds and bounds.filled and not value:
        yield f"{name} is empty: give at least one number"


def _problem(kind: Any, bounds: Bounds | None, label: str, value: Any) -> Iterator[str]:
    allowed = (int, float) if kind is float else (kind,)
    if kind in _KINDS and type(value) not in allowed:
        yield f"{label} must be {_KINDS[kind]}"
    elif bounds and not bounds.allows(value):
        yield f"{label} must be {bounds}"
