"""How text meets a terminal: its width, its colours, and what must not reach it.

Where output is a file or a pipe, lines are neither folded nor coloured. COLUMNS says a width,
NO_COLOR (https://no-color.org) and FORCE_COLOR decide about colours.
"""

from __future__ import annotations

import os
import re
import textwrap
from typing import TextIO

from qwen35.display import printable

__all__ = ["coloured", "fit", "width_of"]

_LEAST = 20
_RESET = "\x1b[0m"
_BAD, _GOOD, _NOTE = "\x1b[1;31m", "\x1b[32m", "\x1b[33m"
_COLOURS = (
    (_BAD, re.compile(r"^error:|^DIFFERS\b|^STOPPED\b|\b(?:CLOSED|FAIL|FAILED|WRONG)\b|✘")),
    (_NOTE, re.compile(r"^note:|^interrupted$|\bWARN\b|⚠")),
    (_GOOD, re.compile(r"^passed: .*|\breproduced, byte for byte$|^all gates open$|\bGOOD\b|✔")),
)
"""What carries a verdict; the words alone say it too."""


def width_of(stream: TextIO) -> int | None:
    """Return the columns that `stream` shows; None if it is no terminal."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) >= _LEAST:
        return int(asked)
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # a file, a pipe, or none of the system's streams
        return None
    return columns if columns >= _LEAST else None


def coloured(stream: TextIO) -> bool:
    """Whether colours may be written to `stream`."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def fit(text: str, stream: TextIO) -> str:
    """Make `text` fit to be shown: folded to the width between words, coloured, escaped."""
    width, colours = width_of(stream), coloured(stream)
    lines = []
    for line in text.split("\n"):
        safe = line if line.isprintable() else printable(line)
        folded = [safe] if width is None or len(safe) <= width else _folded(safe, width)
        lines += [_painted(part) for part in folded] if colours else folded
    return "\n".join(lines)


def _folded(line: str, width: int) -> list[str]:
    indent = len(line) - len(line.lstrip())
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=" " * min(indent + 4, width // 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _painted(line: str) -> str:
    for colour, pattern in _COLOURS:
        line = pattern.sub(rf"{colour}\g<0>{_RESET}", line)
    return line
