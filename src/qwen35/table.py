"""Tables as text, in as many blocks of columns as the width asks for."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

__all__ = ["described_lines", "table_lines"]

_GAP = 2
_NARROW = 6


def table_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None
) -> list[str]:
    """Lay out a table: the first column to the left, the others to the right.

    Args:
        columns: headings.
        rows: cells, as many in each row.
        width: what lines should fit into; if they do not, the columns after the first are divided
            among several blocks, below each other, each with the first column. None for one block.

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
    """Lay out a table whose last column is text, folded below itself to fit into `width`.

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
