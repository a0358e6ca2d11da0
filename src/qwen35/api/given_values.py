"""Arguments as people write them in Python: one name for a list of one, sizes as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from qwen35.display import bytes_of, units_for
from qwen35.errors import UsageError

__all__ = ["listed", "refuse_given", "size_given"]

_LEAST_BYTES = 1000
"""The least number that is taken for bytes: 2 or 512 is someone's GB or MB."""

Name = TypeVar("Name", str, str | Path)


def listed(value: Name | Sequence[Name]) -> tuple[Name, ...]:
    """Return a list of names as a tuple; a single name is a list of one.

    >>> listed("self_attn"), listed(["a", "b"])
    (('self_attn',), ('a', 'b'))
    """
    return (value,) if isinstance(value, str | Path) else tuple(value)


def size_given(flag: str, value: int | str | None) -> int | None:
    """Return bytes, given as a number or as a text such as ``4GB``.

    Args:
        flag: its flag, for the error.
        value: the argument.

    Raises:
        UsageError: it is no size, or a number too small to be bytes.

    >>> size_given("--memory", "1.5GB"), size_given("--memory", 20_000)
    (1500000000, 20000)
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and _LEAST_BYTES <= value < 2**63:
        return value
    try:
        if isinstance(value, str):
            return bytes_of(value)
    except ValueError:
        pass
    written = "" if isinstance(value, bool) or not isinstance(value, int | str) else str(value)
    examples = units_for(written, "4GB").replace(" or ", "' or '")
    expected = f"bytes, or a size such as '{examples}'"
    raise UsageError(flag, repr(value)[:80], expected=expected)


def refuse_given(flags: Mapping[str, object], found: str, hint: str = "leave it out") -> None:
    """Refuse options that would have no effect.

    Args:
        flags: the options by flag; false where not given.
        found: why they have none.
        hint: what to do.

    Raises:
        UsageError: one is given.
    """
    for flag, value in flags.items():
        if value:
            raise UsageError(flag, found, hint=hint)
