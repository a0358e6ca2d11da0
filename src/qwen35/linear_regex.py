"""Regular expressions from files, which a backtracking engine could spend years on."""

from __future__ import annotations

from typing import Protocol

import re2

__all__ = ["MOST_PATTERNS", "LinearPattern", "compile_linear"]

MOST_PATTERNS = 2048
"""Patterns of one file at most: each takes up to milliseconds, and meets every tensor's name. The
largest published size has 1,300 tensors in a GGUF file."""


class LinearPattern(Protocol):
    """A compiled expression; each method returns a match, or None."""

    def search(self, text: str, /) -> object | None:
        """Match anywhere in `text`."""

    def match(self, text: str, /) -> object | None:
        """Match at the start of `text`."""

    def fullmatch(self, text: str, /) -> object | None:
        """Match all of `text`."""


_OPTIONS = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.never_capture = True
_OPTIONS.max_mem = 2**18
"""Bytes for a compiled expression; 8 MiB, RE2's own limit, takes seconds to compile."""


def compile_linear(text: str) -> LinearPattern:
    """Compile an expression that matches in time linear in the text; names are ASCII.

    Raises:
        ValueError: not RE2's syntax, which lacks look-around and back-references, or too large.
    """
    try:
        pattern: LinearPattern = re2.compile(text, _OPTIONS)
    except (re2.error, UnicodeEncodeError) as error:
        why = error.args[0] if error.args else ""
        said = why.decode(errors="replace") if isinstance(why, bytes) else str(error)
        raise ValueError(said) from error
    return pattern
