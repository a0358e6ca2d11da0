"""Sets of layers as recipes spell them: ``"0-3, 7"``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from qwen35.errors import UsageError

__all__ = ["parse_layers", "spell_layers"]

_MOST = 10_000
"""Exclusive bound on layer numbers, so that a range like ``0-99999999`` is not expanded."""
_RANGE = re.compile(r"(\d{1,5})(?:\s*-\s*(\d{1,5}))?\Z")


def parse_layers(subject: str, text: object) -> frozenset[int]:
    """Parse comma-separated layer numbers and inclusive ranges.

    >>> sorted(parse_layers("a rule", "0-2, 7"))
    [0, 1, 2, 7]

    Raises:
        UsageError: `text` is anything else.
    """
    layers: set[int] = set()
    for part in text.split(",") if isinstance(text, str) else [""]:
        match = _RANGE.match(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, _MOST)
        if last < first or last >= _MOST:
            raise UsageError(
                subject, f"layers {text!r}", expected='numbers and ranges such as "0-3, 7"'
            )
        layers.update(range(first, last + 1))
    return frozenset(layers)


def spell_layers(layers: Iterable[int]) -> str:
    """Format layer numbers for `parse_layers`, as short as possible.

    >>> spell_layers([7, 0, 1, 2])
    '0-2, 7'
    """
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
