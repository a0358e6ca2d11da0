"""Keys of servers are blanked where text is shown or recorded, and nowhere else.

What a server sends is judged as it is. Where it becomes text for people or for files, `hidden`
blanks every key that this process has read, however it is spelled: escaped for JSON once or several
times, quoted, in other capitals, with characters between that nobody sees; and pieces of it, as a
text that was cut may end in the middle of a key.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

from qwen35.display import cut, printable

__all__ = ["BLANK", "hidden", "hide", "shown"]

BLANK = "***"

_PIECE = 8
"""Characters of a key that are blanked wherever they are; shorter keys only by themselves, since
everyday words can be keys too (``EMPTY``)."""

_keys: set[str] = set()

_SIGN = re.compile(
    r"\\+u([0-9a-f]{4})|\\+x([0-9a-f]{2})|%(?:25)*([0-9a-f]{2})"
    r"|(&(?:#\w{1,8}|quot|amp|lt|gt|apos);)|(.)",
    re.IGNORECASE | re.DOTALL,
)
"""A character as JSON, Python, addresses and HTML write it."""


def hide(key: str) -> None:
    """Blank this key in whatever is shown from now on."""
    _keys.add(key)


def hidden(text: str) -> str:
    r"""Return a text without any key.

    >>> hide('sk-"one"-0123')
    >>> hidden(r'no: SK-\\\"one\\\"-0123!'), hidden("sk-one")
    ('no: ***!', 'sk-one')
    """
    if not _keys:
        return text
    letters, places = _plain(text)
    marked = bytearray(len(text))
    for key in _keys:
        for first, last in _found(text, letters, places, _plain(key)[0]):
            marked[first:last] = b"\1" * (last - first)
    runs = groupby(zip(text, marked, strict=True), itemgetter(1))
    return "".join(BLANK if mark else "".join(sign for sign, _ in run) for mark, run in runs)


def shown(text: str, most: int) -> str:
    """Return a text of a server for people: without keys, printable, at most `most` characters."""
    # A hostile text may be long: what is far behind the cut is not looked at.
    return cut(printable(hidden(text[: 8 * most])), most)


_Places = list[tuple[int, int]]


def _plain(text: str) -> tuple[str, _Places]:
    """Return a text as letters alone, and where in the text each of them is."""
    letters, places = [], []
    for match in _SIGN.finditer(text):
        letter = _letter(match)
        if letter.isprintable() and not letter.isspace() and letter != "\\":
            letters.append(letter.casefold()[:1])
            places.append(match.span())
    return "".join(letters), places


def _letter(match: re.Match[str]) -> str:
    code = match[1] or match[2] or match[3]
    if code:
        return chr(int(code, 16))
    named = html.unescape(match[4]) if match[4] else match[5]
    return named if len(named) == 1 else "&"


def _found(text: str, letters: str, places: _Places, key: str) -> Iterator[tuple[int, int]]:
    """Yield the places in a text of a key, or of pieces of it."""
    width = min(len(key), _PIECE)
    pieces = {key[i : i + width] for i in range(len(key) - width + 1)}
    for start in range(len(letters) - width + 1) if key else ():
        if letters[start : start + width] in pieces:
            first, last = places[start][0], places[start + width - 1][1]
            inside = text[first - 1 : first].isalnum() or text[last : last + 1].isalnum()
            if len(key) >= _PIECE or not inside:
                yield first, last
