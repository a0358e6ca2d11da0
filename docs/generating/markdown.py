"""What all generated pages share: where they come from, tables, text that is not markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["NOTICE", "cell", "code", "heading", "table"]

NOTICE = "<!-- Made by docs/generate.py from the code; `make docs-pages` makes it again. -->"


def heading(title: str, *lead: str) -> list[str]:
    """Return the first lines of a generated page."""
    return [NOTICE, "", f"# {title}", *(line for text in lead for line in ("", text)), ""]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table and the empty line after it; cells are markdown without line ends."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return [*lines, ""]


def cell(text: str) -> str:
    r"""Return plain text as it can stand in a cell.

    >>> cell("a|b <c> *d*")
    'a\\|b &lt;c> \\*d\\*'
    """
    flat = " ".join(text.split())
    return flat.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")


def code(text: str) -> str:
    r"""Return text as code in a cell; empty stays empty.

    >>> code("a|b"), code("")
    ('`a\\|b`', '')
    """
    return f"`{text}`".replace("|", "\\|") if text else ""
