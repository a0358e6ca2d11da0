"""Text from manifests, reports and file names as Markdown that renders as that text."""

from __future__ import annotations

import html
import re

from qwen35.display import printable

__all__ = ["as_code", "as_text"]

_MARKS = re.compile(
    r"[\\\[\]|`$]"  # an escape, a link, a cell, a code span, a formula
    r"|^[-+*_~#=](?=[-+*_~#= ]|$)|^\d+[.)](?= |$)"  # a list, a heading, a rule, a fence
)
_ADDRESS = re.compile(r"://|www\.|mailto:|xmpp:|[^@]@[^@]", re.IGNORECASE)
"""What makes a link of a word in GitHub's Markdown, which looks through escapes."""


def as_text(value: object) -> str:
    r"""Return `value` on one line, without elements of its own but emphasis; addresses as code.

    Marks become character references: unlike backslashes, all renderers read them alike.

    >>> as_text("a | [b](javascript:c)<script> www.d.e")
    'a &#124; &#91;b&#93;(javascript:c)&lt;script&gt; `www.d.e`'
    """
    words = printable(str(value)).strip().split(" ")
    return " ".join(
        as_code(word) if _ADDRESS.search(word) else _escaped(word, first=not i)
        for i, word in enumerate(words)
    )


def _escaped(word: str, *, first: bool) -> str:
    # The space stands for the text before, where no mark of a block can be.
    marked = _MARKS.sub(_reference, html.escape(word if first else f" {word}", quote=False))
    return marked if first else marked[1:]


def _reference(match: re.Match[str]) -> str:
    return "".join(char if char.isalnum() else f"&#{ord(char)};" for char in match[0])


def as_code(value: object) -> str:
    r"""Return `value` as a code span, in a table or not; a backtick becomes an apostrophe.

    A bar stands between two spans: renderers disagree on backslashes before it.

    >>> as_code("a`b|c")
    "`a'b`&#124;`c`"
    """
    parts = printable(str(value)).replace("`", "'").split("|")
    return "&#124;".join(map(_span, parts))


def _span(text: str) -> str:
    if not text:
        return ""
    # A span loses a space at both ends.
    padding = " " * (text[0] == text[-1] == " " and text.strip() != "")
    return f"`{padding}{text}{padding}`"
