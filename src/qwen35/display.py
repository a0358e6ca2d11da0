"""How sizes and names are shown to people."""

from __future__ import annotations

__all__ = ["bytes_of", "least", "printable", "size"]


def bytes_of(text: str) -> int:
    """Parse a size as people write it.

    Raises:
        ValueError: it is none.

    >>> bytes_of("400MB"), bytes_of("1.5GiB"), bytes_of("123")
    (400000000, 1610612736, 123)
    """
    units = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    for unit, factor in units.items():
        if text.lower().endswith(unit.lower()):
            return round(min(float(text[: -len(unit)]), 1e9) * factor)
    return int(text)


def size(nbytes: int) -> str:
    """Return a size in decimal units, for people.

    >>> size(1_234_000_000)
    '1.23 GB'
    """
    factor, unit = _unit(nbytes)
    return f"{nbytes / factor:.2f} {unit}" if factor > 1 else f"{nbytes} B"


def least(nbytes: int) -> str:
    """Return a size as `size` does, rounded up: so much is enough when it is typed.

    >>> least(1_234_000_001)
    '1.24 GB'
    """
    factor, _ = _unit(nbytes)
    return size(-(-100 * nbytes // factor) * factor // 100)


def _unit(nbytes: int) -> tuple[int, str]:
    """Return the bytes of the unit that a size is shown in, and its name."""
    units = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
    return next((unit for unit in units if nbytes >= unit[0]), (1, "B"))


def printable(text: str) -> str:
    r"""Escape what a hostile name could do to a terminal: control codes, surrogates.

    >>> printable("a\x1b[2J")
    'a\\x1b[2J'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
