"""Values out of JSON that anybody may have written: of the wanted type, or None."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["count_in", "list_in", "number_in", "parsed", "text_in", "value_in"]


def parsed(data: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, or holds NaN, infinity or a number that is too long.
    """
    try:
        return json.loads(data, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def value_in(value: Any, *path: str | int) -> Any:
    """Return what lies at a path of keys and indices; None if there is nothing.

    >>> value_in({"a": [1, {"b": 2}]}, "a", 1, "b"), value_in([], 0, "b")
    (2, None)
    """
    for step in path:
        if isinstance(step, str) and isinstance(value, dict):
            value = value.get(step)
        elif isinstance(step, int) and isinstance(value, list) and -len(value) <= step < len(value):
            value = value[step]
        else:
            return None
    return value


def text_in(value: Any, *path: str | int) -> str | None:
    r"""Return the text at a path, with U+FFFD in place of half characters.

    >>> text_in(["a\ud83d"], 0)
    'a\ufffd'
    """
    found = value_in(value, *path)
    if not isinstance(found, str):
        return None
    return found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def list_in(value: Any, *path: str | int) -> list[Any]:
    """Return the list at a path; an empty one if there is none."""
    found = value_in(value, *path)
    return found if isinstance(found, list) else []


def number_in(value: Any, *path: str | int) -> float | None:
    """Return the finite number at a path."""
    found = value_in(value, *path)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        number = float(found)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def count_in(value: Any, *path: str | int) -> int | None:
    """Return the whole number at a path, from 0 to 2**53."""
    found = value_in(value, *path)
    whole = isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= 2**53
    return int(found) if whole else None
