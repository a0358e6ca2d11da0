"""Text from manifests, reports and file names as Markdown that renders as that text."""

from __future__ import annotations

import html
import re

from qwen35.display import printable

__all__ = ["as_code", "as_text"]

_MARKS = re.compile(r"[\\\[\]|]")
"""What opens a link, an image or the next cell. Emphasis and code spans are harmless."""


def as_text(value: object) -> str:
    r"""Return `value` on one line, without HTML, links, images and table cells of its own.

    >>> as_text("a | [b](javascript:c)<script>")
    'a \\| \\[b\\](javascript:c)&lt;script&gt;'
    """
    return html.escape(_MARKS.sub(r"\\\g<0>", printable(str(value))), quote=False)


def as_code(value: object) -> str:
    r"""Return `value` to be put between backticks, in a table or not.

    >>> as_code("a`b|c")
    "a'b\\|c"
    """
    return printable(str(value)).replace("`", "'").replace("|", r"\|")
