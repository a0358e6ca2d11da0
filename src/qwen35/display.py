"""Human-readable sizes and names."""

from __future__ import annotations

import re

__all__ = ["bytes_of", "counted", "cut", "printable", "size", "size_rounded_up", "units_for"]

_BARE_BYTES = 10**6
"""The least size that may be a bare number of bytes: 6 is someone's 6 GB, never 6 bytes."""


def bytes_of(text: str) -> int:
    """Parse a human-written size.

    Raises:
        ValueError: `text` is not a size, or none that is more than 0 bytes, or a small number
            without a unit.

    >>> bytes_of("400MB"), bytes_of("1.5GiB"), bytes_of("2G"), bytes_of("12B"), bytes_of("5000000")
    (400000000, 1610612736, 2000000000, 12, 5000000)
    """
    units = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    units |= {"TB": 10**12, "TiB": 2**40}
    units |= {"k": 10**3, "M": 10**6, "G": 10**9}  # as tools of llama.cpp read them
    units |= {"B": 1}  # last: the others end in it
    for unit, factor in units.items():
        if text.lower().endswith(unit.lower()):
            found = float(text[: -len(unit)]) * factor
            break
    else:
        found = int(text)
        if found < _BARE_BYTES:
            raise ValueError(f"{text!r} has no unit")
    if not 0.5 < found < 2**63:  # NaN is not, nor infinity
        raise ValueError(f"{text!r} is not a size")
    return round(found)


def units_for(text: str, usual: str, units: tuple[str, ...] = ("GB", "MB")) -> str:
    """Return examples of what to write for a text that is not a size.

    Args:
        text: what was written; a number that only lacks its unit is part of the examples.
        usual: the examples for any other text.
        units: what the number may have meant.

    >>> units_for("6", "400MB or 1.5GiB"), units_for("big", "400MB or 1.5GiB")
    ('6GB or 6MB', '400MB or 1.5GiB')
    """
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) and float(text):
        return " or ".join(text + unit for unit in units)
    return usual


def size(nbytes: int) -> str:
    """Format a size in decimal units.

    >>> size(1_234_000_000)
    '1.23 GB'
    """
    factor, unit = _unit(nbytes)
    return f"{nbytes / factor:.2f} {unit}" if factor > 1 else f"{nbytes} B"


def size_rounded_up(nbytes: int) -> str:
    """Format a size like `size`, rounded up: parsing the result never yields less.

    >>> size_rounded_up(1_234_000_001)
    '1.24 GB'
    """
    factor, _ = _unit(nbytes)
    return size(-(-100 * nbytes // factor) * factor // 100)


def _unit(nbytes: int) -> tuple[int, str]:
    """Return the display unit of a size: its bytes and its name."""
    units = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
    return next((unit for unit in units if nbytes >= unit[0]), (1, "B"))


def counted(count: int, thing: str) -> str:
    """Return a number of things, in the plural unless it is one.

    >>> counted(1, "chunk"), counted(2, "chunk")
    ('1 chunk', '2 chunks')
    """
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def printable(text: str) -> str:
    r"""Escape control codes and surrogates, so that a hostile name cannot drive a terminal.

    >>> printable("a\x1b[2J")
    'a\\x1b[2J'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def cut(text: str, most: int) -> str:
    """Return at most `most` characters of a text; the end shows if some are missing.

    >>> cut("a sentence", 10), cut("a sentence", 9)
    ('a sentence', 'a sent...')
    """
    return text if len(text) <= most else f"{text[: most - 3]}..."
