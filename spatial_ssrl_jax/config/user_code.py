"""Python code of the user's own: config files, reward functions, tasks."""

import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import cloudpickle

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.text import error_line, utf8

_PLAIN = (bool, int, float, str, bytes, tuple, list, dict, set, frozenset, type(None), re.Pattern)
_LONGEST = 10_000  # characters of a value that are recorded


def load_module(path: str) -> ModuleType:
    """Runs a Python file.

    What it defines can be sent to other processes, which need not find the file.

    Args:
      path: the file.

    Raises:
      UserError: it is no Python file, or fails.
    """
    # A name of each file's own, as one config file may load another.
    name = f"user_{Path(path).stem}_{sha256(utf8(os.path.abspath(path))).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: give one such as configs/tiny.py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # `inspect` and dataclasses look it up
    cloudpickle.register_pickle_by_value(module)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is a program, which may raise any
        raise UserError(broken(path, error)) from error
    return module


def broken(path: str, error: BaseException) -> str:
    """A sentence for a file of the user's that raises."""
    return (
        f"{path} cannot be run ({type(error).__name__}: {error_line(error)}): fix it; --debug "
        "shows where."
    )


def load_function(text: str, key: str) -> Any:
    """The function that `FILE.py:NAME` names.

    Args:
      text: the file and the name.
      key: the config's key, for errors.

    Raises:
      UserError: the file is missing or fails, or has no such function.
    """
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UserError(f"{key}={text} does not fit: write FILE.py:NAME.")
    if not Path(path).is_file():
        raise UserError(f"{key}={text}: there is no file {path}.")
    module = load_module(path)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise UserError(
            f"{key}={text}: {path} has no function {name}, only {', '.join(known) or 'none'}."
        )
    return function


def source_of(function: Any) -> dict[str, str]:
    """The source of a function or class and of what it uses of its own file, by name.

    Constants are given by their value, the same in every process. What it imports is left out.
    """
    found: dict[str, str] = {}
    pending = [(_name(function), function)]
    while pending:
        name, item = pending.pop()
        item = inspect.unwrap(item)
        if name not in found:
            found[name] = _text(item) if _has_source(item) else _short(_text(item))
            pending += _uses(item)
    return dict(sorted(found.items()))


def _name(item: Any) -> str:
    return getattr(item, "__qualname__", type(item).__qualname__)


def _text(item: Any) -> str:
    """A value, or the source of a function, a class, or an object's class with its plain values."""
    if isinstance(item, partial):
        return f"partial({_text([item.func, *item.args])}, {_text(item.keywords)})"
    if isinstance(item, (set, frozenset)):  # their order differs from process to process
        return f"{{{', '.join(sorted(map(_text, item)))}}}"
    if isinstance(item, (list, tuple)):
        return f"[{', '.join(map(_text, item))}]"
    if isinstance(item, dict):
        return f"{{{', '.join(f'{_text(k)}: {_text(v)}' for k, v in item.items())}}}"
    if isinstance(item, _PLAIN):
        return repr(item)
    try:
        if _has_source(item):
            return inspect.getsource(item)
        plain = {k: v for k, v in getattr(item, "__dict__", {}).items() if isinstance(v, _PLAIN)}
        return f"{inspect.getsource(type(item))}{_text(plain)}"
    except (OSError, TypeError):
        return _name(item)


def _short(text: str) -> str:
    """A long text, as of a file that was read, by its beginning and hash."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[:100]}… ({len(text):,} characters, SHA-256 {sha256(utf8(text)).hexdigest()})"


def _has_source(item: Any) -> bool:
    return inspect.isroutine(item) or inspect.isclass(item)


def _uses(item: Any) -> Iterator[tuple[str, Any]]:
    """Names and values, of its own file, that a function, a class or the items of a value use."""
    if isinstance(item, partial):
        item = [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, (list, tuple, set, frozenset)):
        yield from ((_name(value), value) for value in item if not isinstance(value, _PLAIN))
    if isinstance(item, _PLAIN):
        return
    item = item if _has_source(item) else type(item)
    functions = [item]
    if inspect.isclass(item):
        yield from ((_name(b), b) for b in item.__bases__ if b.__module__ == item.__module__)
        functions = [getattr(value, "__func__", value) for value in vars(item).values()]
    for function in filter(_is_written, functions):
        names = {name for part in _codes(function.__code__) for name in part.co_names}
        values = {k: v for k, v in function.__globals__.items() if k in names}
        for name, value in {**values, **inspect.getclosurevars(function).nonlocals}.items():
            own = getattr(value, "__module__", None) == function.__module__
            if own or isinstance(value, (*_PLAIN, partial)):
                yield name, value


def _is_written(function: Any) -> bool:
    """Whether it is a function that stands in a file, unlike a dataclass's own methods."""
    file = getattr(function, "__globals__", {}).get("__file__")
    return inspect.isfunction(function) and function.__code__.co_filename == file


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
