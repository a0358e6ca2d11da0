"""Groups of units that are probed together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qwen35.tuning.units import Unit

__all__ = ["UnitGroup", "group_units", "rank_correlation"]


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind in neighbouring layers, probed together."""

    name: str
    units: tuple[str, ...]


def group_units(units: Sequence[Unit], most: int) -> list[UnitGroup]:
    """Group units of a kind in neighbouring layers, into at most `most` groups if possible.

    Kinds are never mixed, so there are at least as many groups as kinds.
    """
    kinds: dict[str, list[Unit]] = defaultdict(list)
    for unit in units:
        kinds[unit.kind].append(unit)
    bands = max(len(members) for members in kinds.values())
    while bands > 1 and sum(min(bands, len(members)) for members in kinds.values()) > most:
        bands -= 1
    groups = []
    for members in kinds.values():
        members.sort(key=lambda unit: -1 if unit.layer is None else unit.layer)
        count = min(bands, len(members))
        for i in range(count):
            part = members[i * len(members) // count : (i + 1) * len(members) // count]
            name = part[0].name if len(part) == 1 else f"{part[0].name}-{part[-1].layer}"
            groups.append(UnitGroup(name, tuple(unit.name for unit in part)))
    return groups


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two series; 0 for fewer than two values.

    >>> rank_correlation([1, 2, 3], [10, 20, 25])
    1.0
    """
    a, b = _ranks(first), _ranks(second)
    if len(a) < 2:
        return 0.0
    mean = (len(a) - 1) / 2
    norm = (sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)) ** 0.5
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return covariance / norm if norm else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 0; equal values share their mean rank."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for index in order[start : end + 1]:
            ranks[index] = (start + end) / 2
        start = end + 1
    return ranks
