"""Arguments of another type than a function takes, refused before anything is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from qwen35.errors import UsageError

__all__ = ["plain_arguments"]

P = ParamSpec("P")
T = TypeVar("T")

_NUMPY_BOOLS = (("numpy", "bool"), ("numpy", "bool_"))
"""Module and name: arguments are checked without NumPy, which takes long to import."""

_FORMER = {"windows": "chunks"}
"""Names that arguments had, and have now."""

_COUNTED = ("threads", "workers")
"""Arguments of which there is at least one."""


def plain_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function whose numbers, switches, names and lists of names are of plain types.

    Annotations say what an argument is. Numbers of NumPy become those of Python, which JSON takes;
    iterables of names become tuples; what fits no annotation is refused.

    Raises:
        UsageError: an argument is of another type; it is called by its flag.
    """

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        given: dict[str, Any] = dict(kwargs)
        for old, new in _FORMER.items():
            if old in given and new not in given and new in signature(function).parameters:
                given[new] = given.pop(old)
        bound = signature(function).bind(*args, **given)
        for name, value in bound.arguments.items():
            parameter = bound.signature.parameters[name]
            if parameter.kind is Parameter.VAR_POSITIONAL:
                bound.arguments[name] = tuple(_plain(parameter, one) for one in value)
            else:
                bound.arguments[name] = _plain(parameter, value)
        return function(*bound.args, **bound.kwargs)

    return checked


_SECRET = {"api_key_env": "give the name of a variable that holds the key", "hf_token": ""}
"""What may hold a key, and what to give instead."""


def _plain(parameter: Parameter, value: Any) -> Any:
    """Return an argument as its annotation says.

    Raises:
        UsageError: it is of another type.
    """
    kind, name = str(parameter.annotation), parameter.name
    if value is None and (kind.endswith("None") or parameter.default is None):
        return None
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = int(value)
    read, expected = _KINDS.get(kind.removesuffix(" | None"), (lambda value: value, ""))
    if read is _whole and name in _COUNTED:
        read, expected = _count, "1 or more"
    try:
        return read(value)
    except (TypeError, ValueError) as error:
        flag = f"--{name.replace('_', '-')}"
        found, hint = repr(value)[:80], ""
        if name in _SECRET:  # which is not repeated
            text = isinstance(value, str)
            found = "holds what no text may" if text else f"of type {type(value).__name__}"
            hint = _SECRET[name]
        raise UsageError(flag, found, expected=expected, hint=hint) from error


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _count(value: object) -> int:
    if _whole(value) < 1:
        raise ValueError
    return _whole(value)


def _number(value: Any) -> int | float:
    if type(value) in (int, float):
        number: int | float = value
        return number
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    return float(value)


def _switch(value: Any) -> bool:
    kind = type(value)
    if kind is bool or (kind.__module__, kind.__name__) in _NUMPY_BOOLS:
        return bool(value)
    raise TypeError


def _text(value: object) -> str:
    """Return a text that the system takes: no null characters, no lone surrogates."""
    if not isinstance(value, str):
        raise TypeError
    if b"\0" in os.fsencode(value):
        raise ValueError
    return value


def _path(value: object) -> str | Path:
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, os.PathLike):
        raise TypeError
    name = _text(os.fspath(value))
    return value if isinstance(value, Path) else Path(name)


def _texts(value: object) -> str | tuple[str, ...]:
    return _text(value) if isinstance(value, str) else tuple(map(_text, _items(value)))


def _paths(value: object) -> str | Path | tuple[str | Path, ...]:
    if isinstance(value, str | os.PathLike):
        return _path(value)
    return tuple(map(_path, _items(value)))


def _items(value: object) -> Iterable[object]:
    if not isinstance(value, Iterable) or isinstance(value, bytes | Mapping):
        raise TypeError
    return value


def _pair(value: object) -> tuple[int, int]:
    if not isinstance(value, tuple):
        raise TypeError
    first, second = (int(one) if isinstance(one, Integral) else one for one in value)
    return _whole(first), _whole(second)


_NAMES = "a name, or a list of names"
_CHOICES = ("Bands", "Depth", "Dtype", "Engine", "Format", "KvCache", "Mode", "ScaleMode")
"""Annotations that stand for a choice of texts."""

_KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "int": (_whole, "a whole number"),
    "float": (_number, "a number"),
    "bool": (_switch, "True or False"),
    "str": (_text, "a text"),
    "str | Path": (_path, "a text or a Path"),
    "str | Sequence[str]": (_texts, _NAMES),
    "str | Path | Sequence[str | Path]": (_paths, _NAMES),
    "Sequence[str | Path]": (_paths, _NAMES),
    "PathName | Sequence[PathName]": (_texts, _NAMES),
    "tuple[int, int]": (_pair, "two whole numbers: (i, N)"),
    **dict.fromkeys(_CHOICES, (_text, "a text")),
}
"""Annotation to what makes an argument plain, and what is expected."""
