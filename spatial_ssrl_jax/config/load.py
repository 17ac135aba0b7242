"""Loading a config file, overriding single settings, and the config as plain JSON types."""

import ast
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.config.schema import Config, RewardFunction
from spatial_ssrl_jax.config.user_code import broken, load_function, load_module, source_of
from spatial_ssrl_jax.config.validate import check_settings


def load_config(path: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Runs a config file's `get_config()` and applies overrides.

    Args:
      path: a Python file.
      overrides: pairs of a dotted key below the config and its value as text.

    Raises:
      UserError: the file is missing or broken, a key is unknown, or a value does not fit.
    """
    if not Path(path).is_file():
        raise UserError(f"the config file {path} does not exist: give one such as configs/tiny.py.")
    module = load_module(path)
    try:
        config = module.get_config()
    except (Exception, SystemExit) as error:  # it is a program, which may raise any
        raise UserError(broken(path, error)) from error
    if not isinstance(config, Config):
        raise UserError(
            f"{path}: get_config() gives {type(config).__name__}; it must give a Config, as that "
            "of configs/tiny.py does."
        )
    return with_overrides(config, overrides)


def with_overrides(config: Config, overrides: Sequence[tuple[str, str]]) -> Config:
    """The config with single settings replaced, as for `load_config`; checks all of it.

    Raises:
      UserError: a key is unknown, or a value does not fit.
    """
    for key, text in overrides:
        config = _override(config, key.split("."), text, key)
    check_settings(config)
    return config


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.a.b=v` and `--config.a.b v` out of a command line."""
    rest, overrides = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not equals and (value := next(words, None)) is None:
            raise UserError(f"--config.{key} has no value: write --config.{key}=VALUE.")
        overrides.append((key, value))
    return rest, overrides


def _override(node: Any, keys: list[str], text: str, whole: str) -> Any:
    """`node` with the value below `keys` replaced by what `text` says."""
    is_dict = isinstance(node, dict)
    known = list(node) if is_dict else [f.name for f in dataclasses.fields(node)]
    key, *rest = keys
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}."
        raise UserError(f"unknown config key config.{whole}: {hint}")
    value = node[key] if is_dict else getattr(node, key)
    nested = isinstance(value, dict) or dataclasses.is_dataclass(value)
    if rest and not nested:
        raise UserError(
            f"config.{whole} goes too deep: config.{whole.rsplit('.', 1)[0]} is a value; set that."
        )
    if not rest and nested:
        raise UserError(
            f"config.{whole} is a section: set one of {', '.join(_names(value))} in it."
        )
    if rest:
        new = _override(value, rest, text, whole)
    else:
        hint = None if is_dict else typing.get_type_hints(type(node))[key]
        if hint == tuple[str, ...]:
            new = _parse_words(text)
        elif RewardFunction in typing.get_args(hint):
            new = load_function(text, f"config.{whole}") if text else None
        else:
            new = _parse(text, type(value), whole)
    return {**node, key: new} if is_dict else dataclasses.replace(node, **{key: new})


def _names(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else [f.name for f in dataclasses.fields(value)]


def _parse_words(text: str) -> tuple[str, ...]:
    """`vision,merger`, or the same with brackets and quotes; nothing is the empty tuple."""
    return tuple(word.strip(" '\"") for word in text.strip("()").split(",") if word.strip())


def _parse(text: str, kind: type, key: str) -> Any:
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None  # the last two where brackets are nested too deeply
    if kind is tuple and isinstance(value, (int, float)):
        value = (value,)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and not _is_whole_numbers(value):
        raise UserError(
            f"config.{key}={text} does not fit: expected whole numbers, such as (1, 2)."
        )
    if type(value) is not kind:
        raise UserError(f"config.{key}={text} does not fit: expected {kind.__name__}.")
    return value


def _is_whole_numbers(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(item) is int for item in value)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON types; functions are given by their source, see `source_of`."""
    return typing.cast(dict[str, Any], _plain(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return {"name": name, "source": source_of(value)}
    return value
