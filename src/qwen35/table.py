"""Text tables, split into blocks of columns to fit a width."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

__all__ = ["described_lines", "html_lines", "html_table", "table_lines"]

_GAP = 2
_NARROW = 6  # narrower columns of prose are unreadable: let them overflow instead


def table_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None
) -> list[str]:
    """Lay out a table: first column left-aligned, the others right-aligned.

    Args:
        columns: headings.
        rows: cells, one per column.
        width: maximum line length; wider tables are split into stacked blocks that each repeat the
            first column. None for a single block.

    >>> table_lines(["", "one", "two"], [["a", "1", "2"], ["b", "10", "20"]])
    ['   one  two', 'a    1    2', 'b   10   20']
    >>> table_lines(["", "one", "two"], [["a", "1", "2"]], width=8)
    ['   one', 'a    1', '', '   two', 'a    2']
    """
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    blocks: list[list[int]] = [[]]
    taken = widths[0]
    for i in range(1, len(columns)):
        if blocks[-1] and width is not None and taken + _GAP + widths[i] > width:
            blocks.append([])
            taken = widths[0]
        blocks[-1].append(i)
        taken += _GAP + widths[i]
    lines: list[str] = []
    for block in blocks:
        lines += [""] if lines else []
        for row in (columns, *rows):
            cells = [f"{row[i]:>{widths[i]}}" for i in block]
            lines.append((" " * _GAP).join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())
    return lines


def described_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None
) -> list[str]:
    """Lay out a table whose last column is prose, wrapped to fit `width`.

    >>> described_lines(["role", "means"], [["a", "one two"]], width=12)
    ['role  means', 'a     one', '      two']
    """
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns) - 1)]
    lines = []
    for row in (columns, *rows):
        start = "".join(f"{cell:<{size + _GAP}}" for cell, size in zip(row, widths, strict=False))
        room = None if width is None else max(width - len(start), _NARROW)
        parts = [row[-1]] if room is None else textwrap.wrap(row[-1], room) or [""]
        lines += [(start if i == 0 else " " * len(start)) + part for i, part in enumerate(parts)]
    return [line.rstrip() for line in lines]


def html_lines(lines: Iterable[str]) -> str:
    """Return lines as HTML paragraphs.

    >>> html_lines(["a < b"])
    '<p>a &lt; b</p>'
    """
    from html import escape

    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return an HTML table, as notebooks show results; the first column names the row.

    >>> html_table(["", "n"], [["<a>", "1"]])
    '<table><tr><th></th><th>n</th></tr><tr><th>&lt;a&gt;</th><td>1</td></tr></table>'
    """
    from html import escape  # only notebooks need it

    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = [f"<tr>{head}</tr>"]
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}{''.join(lines)}</table>"
