"""Python code of the user's own: config files, reward functions, tasks."""

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import cloudpickle

from spatial_ssrl_jax.common.errors import UserError
from spatial_ssrl_jax.common.text import error_line

_PLAIN = (bool, int, float, str, bytes, tuple, list, dict, set, frozenset, type(None), re.Pattern)


def load_module(path: str, name: str) -> ModuleType:
    """Runs a Python file.

    What it defines can be sent to other processes, which need not find the file.

    Args:
      path: the file.
      name: of the module.

    Raises:
      UserError: it is no Python file, or fails.
    """
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
    module = load_module(path, f"user_{Path(path).stem}")
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise UserError(
            f"{key}={text}: {path} has no function {name}, only {', '.join(known) or 'none'}."
        )
    return function


def source_of(function: Any) -> dict[str, str]:
    """The source of a function or class and of what it uses of its own file, by name.

    Constants are given by their value. What it imports is left out.
    """
    found: dict[str, str] = {}
    pending = [(getattr(function, "__qualname__", type(function).__qualname__), function)]
    while pending:
        name, item = pending.pop()
        if name not in found:
            found[name] = _text(item)
            pending += _uses(item)
    return dict(sorted(found.items()))


def _text(item: Any) -> str:
    if isinstance(item, _PLAIN):
        return repr(item)
    try:
        return inspect.getsource(item if _has_source(item) else type(item))
    except (OSError, TypeError):
        return repr(type(item))


def _has_source(item: Any) -> bool:
    return inspect.isroutine(item) or inspect.isclass(item)


def _uses(item: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the globals, of its own file, that a function or class uses."""
    if isinstance(item, _PLAIN):
        return
    item = item if _has_source(item) else type(item)
    functions = (
        [f for f in vars(item).values() if inspect.isfunction(f)]
        if inspect.isclass(item)
        else [item]
    )
    for function in functions:
        code, names = getattr(function, "__code__", None), set[str]()
        if code is None:
            continue
        for part in _codes(code):
            names.update(part.co_names)
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            own = getattr(value, "__module__", None) == function.__module__
            if own or isinstance(value, _PLAIN):
                yield name, value


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
