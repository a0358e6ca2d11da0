"""Fit text to a terminal: wrap, colour and escape it.

In a file or a pipe, lines are neither wrapped nor coloured. COLUMNS overrides the width, NO_COLOR
(https://no-color.org) and FORCE_COLOR override colours.
"""

from __future__ import annotations

import os
import re
import textwrap
from typing import TextIO

from qwen35.display import printable

__all__ = ["coloured", "fit", "width_of"]

_MIN_COLUMNS = 20  # narrower wrapping is unreadable
_RESET = "\x1b[0m"
_BAD, _GOOD, _NOTE = "\x1b[1;31m", "\x1b[32m", "\x1b[33m"
_COLOURS = (
    (_BAD, re.compile(r"^error:|^DIFFERS\b|^STOPPED\b|\b(?:CLOSED|FAIL|FAILED|WRONG)\b|✘")),
    (_NOTE, re.compile(r"^note:|^interrupted$|\bWARN\b|⚠")),
    (_GOOD, re.compile(r"^passed: .*|\breproduced, byte for byte$|^all gates open$|\bGOOD\b|✔")),
)
"""Words that carry a verdict; colours only repeat them."""


def width_of(stream: TextIO) -> int | None:
    """Return the number of columns of `stream`; None if it is not a terminal."""
    override = os.environ.get("COLUMNS", "")
    if override.isdecimal() and int(override) >= _MIN_COLUMNS:
        return int(override)
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # a file, a pipe, or a replaced stream
        return None
    return columns if columns >= _MIN_COLUMNS else None


def coloured(stream: TextIO) -> bool:
    """Whether colours may be written to `stream`."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def fit(text: str, stream: TextIO) -> str:
    """Return `text` ready to print: wrapped at the width, coloured, escaped."""
    width, colours = width_of(stream), coloured(stream)
    lines = []
    for line in text.split("\n"):
        # text from files must not reach the terminal as escape sequences
        safe = line if line.isprintable() else printable(line)
        wrapped = [safe] if width is None or len(safe) <= width else _wrap(safe, width)
        lines += [_colour(part) for part in wrapped] if colours else wrapped
    return "\n".join(lines)


def _wrap(line: str, width: int) -> list[str]:
    indent = len(line) - len(line.lstrip())
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=" " * min(indent + 4, width // 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _colour(line: str) -> str:
    for colour, pattern in _COLOURS:
        line = pattern.sub(rf"{colour}\g<0>{_RESET}", line)
    return line
