"""JSON files that others wrote: what is wrong with one is said in a sentence, value by value."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from etils import epath

from spatial_ssrl_jax.common.bounds import Bounds
from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.paths import check_regular
from spatial_ssrl_jax.common.text import error_line, shown

FETCH = "fetch it again"
_KINDS: dict[type, tuple[str, tuple[type, ...]]] = {  # in words, and the types that JSON has
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("text", (str,)),
    list: ("a list", (list,)),
    dict: ("an object", (dict,)),
}
Kind = TypeVar("Kind", bool, int, float, str, list[Any], dict[str, Any])


def parse_json(content: str | bytes, name: str, fix: str = FETCH) -> Any:
    """The value that JSON text holds; a byte order mark is skipped.

    Args:
      content: UTF-8 where it is bytes.
      name: the file, or a line of it, in errors.
      fix: how an error ends.

    Raises:
      UserError: it is no JSON, is nested too deeply, or holds half of a surrogate pair, which
        cannot be written again.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        text = text.removeprefix("\ufeff")
        if not text.strip("\0 \t\r\n"):
            raise UserError(f"{name} is empty: {fix}.")
        found = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (at byte {error.start}): {fix}.") from None
    except UnicodeEncodeError:
        raise UserError(f"{name} holds half of a character (\\ud…): {fix}.") from None
    except (ValueError, RecursionError) as error:
        reason = error_line(error).partition(";")[0]
        raise UserError(f"{name} is not valid JSON ({reason}): {fix}.") from None
    return found


def read_json(path: epath.PathLike, fix: str = FETCH) -> Any:
    """The value in a file; see `parse_json`.

    Raises:
      UserError: see there, or what is at the path is no file.
      OSError: it cannot be read.
    """
    check_regular(path, fix)
    content = epath.Path(path).read_bytes()
    return parse_json(content, os.fspath(path), fix)


def read_object(path: epath.PathLike, fix: str = FETCH) -> "JsonObject":
    """The object in a file; raises as `read_json`, and where the file holds something else."""
    return as_object(read_json(path, fix), os.fspath(path), fix)


def as_object(value: Any, name: str, fix: str = FETCH) -> "JsonObject":
    """A parsed value as an object; raises `UserError` where it is something else."""
    if not isinstance(value, dict):
        raise UserError(f"{name} holds no JSON object: {fix}.")
    return JsonObject(value, name, fix)


@dataclass(frozen=True)
class JsonObject:
    """An object of a JSON file, whose values are checked when they are taken.

    Args:
      values: the object; null counts as no value.
      name: the file in errors.
      fix: how an error ends.
      prefix: keys that lead to the object in its file, each with a dot.
    """

    values: Mapping[str, Any]
    name: str
    fix: str = FETCH
    prefix: str = ""

    def get(
        self,
        key: str,
        kind: type[Kind],
        default: Kind | None = None,
        bounds: Bounds | None = None,
    ) -> Kind:
        """A value of a type; `default` where it is missing, which None does not allow.

        Raises:
          UserError: it is missing, of another type, or outside of `bounds`.
        """
        found = self.find(key, kind, bounds)
        if found is None:
            found = default
        if found is None:
            raise UserError(f"{self.name} lacks the key '{self.prefix}{key}': {self.fix}.")
        return found

    def find(self, key: str, kind: type[Kind], bounds: Bounds | None = None) -> Kind | None:
        """As `get`, but None where the value is missing."""
        value = self.values.get(key)
        if value is not None:
            self._check(key, value, kind, bounds or Bounds())
        return value

    def section(self, key: str) -> "JsonObject":
        """The object at a key, empty where it is missing."""
        return JsonObject(self.get(key, dict, {}), self.name, self.fix, f"{self.prefix}{key}.")

    def items(
        self,
        key: str,
        kind: type[Kind],
        default: tuple[Kind, ...] | None = None,
        length: int | None = None,
        bounds: Bounds | None = None,
    ) -> tuple[Kind, ...]:
        """A list of values of a type, of a length, each within `bounds`; see `get`."""
        found = self.get(key, list, None if default is None else list(default))
        if length is not None and len(found) != length:
            self.refuse(key, f"a list of {length}")
        for item in found:
            self._check(key, item, kind, bounds or Bounds())
        return tuple(found)

    def _check(self, key: str, value: Any, kind: type, bounds: Bounds) -> None:
        words, types = _KINDS[kind]
        if bounds != Bounds():
            words += f", {bounds}"
        if type(value) not in types or (kind in (int, float) and not bounds.allows(value)):
            self.refuse(key, words)

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raises the `UserError` of a value that is not what is expected."""
        raise UserError(
            f"{self.name} holds a wrong value ({self.prefix}{key} is {shown(self.values[key])}, "
            f"expected {expected}): {self.fix}."
        )
