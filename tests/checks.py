"""jaxtyping's checks of annotations, made once of calls that no check could tell apart.

What an annotation says is of types, shapes and dtypes. Where all of these are as they were in an
earlier call of the function in the same test, so is the answer; layers, steps and heads of a model
call with the same shapes over and over, and checking each call took a third of the time of tests.
Functions that name no shape are left to mypy.
"""

import dataclasses
import functools
import inspect
from collections.abc import Hashable
from typing import Any

import jaxtyping
import torch
from jaxtyping._import_hook import _JaxtypingLoader

_check = jaxtyping.jaxtyped
_seen: set[Hashable] = set()


def install() -> None:
    """Let jaxtyping's import hook, which decorates all functions, use the decorator below.

    While the hook loads a module it gives compiled files other names, those of all that the module
    imports too: torch, scipy and others would be compiled anew in every process that tests.
    """
    jaxtyping.jaxtyped = _checked_once
    _JaxtypingLoader.exec_module = _load


def _load(loader: Any, module: Any) -> None:
    exec(loader.source_to_code(loader.get_data(loader.path), loader.path), vars(module))


def forget() -> None:
    """Check every kind of call anew, as every test does."""
    _seen.clear()


def _checked_once(function: Any = None, **typechecker: Any) -> Any:
    if function is None:
        return functools.partial(_checked_once, **typechecker)
    if inspect.isclass(function):
        own = dataclasses.is_dataclass(function) and "__init__" in vars(function)
        if own and not getattr(function, "__no_type_check__", False):
            function.__init__ = _checked_once(function.__init__, **typechecker)
        return function
    if not inspect.isfunction(function):  # a descriptor
        return _check(function, **typechecker)
    if not any("[Tensor," in str(of) for of in function.__annotations__.values()):
        return function
    checked = None

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        # A graph cannot hold the checks.
        if torch.compiler.is_compiling() or jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        named = ((name, _kind(x)) for name, x in kwargs.items())
        call = (function.__code__, *map(_kind, args), *named)
        if call in _seen:
            return function(*args, **kwargs)
        # Only now: functions inside of others are made anew in every call of these, and to make
        # their checks takes longer than to make them.
        checked = checked or _check(function, **typechecker)
        result = checked(*args, **kwargs)
        _seen.add(call)
        return result

    if not inspect.isgeneratorfunction(function):
        return wrapped

    @functools.wraps(function)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        # Who asks whether it is a generator's, as gradio does, gets the answer that users get.
        return (yield from wrapped(*args, **kwargs))

    return stepped


def _kind(value: Any) -> Hashable:
    """What annotations can tell of a value. Tensors may be inside of tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):  # a nested one has no shape
        return type(value), () if value.is_nested else value.shape, value.dtype
    if isinstance(value, tuple | list):
        return type(value), *map(_kind, value)
    if isinstance(value, dict):
        return type(value), *((_kind(name), _kind(x)) for name, x in value.items())
    if isinstance(value, str | int | None):  # which may have to be one of a few
        return type(value), value
    return type(value)
