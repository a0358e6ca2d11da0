"""From squared errors to divergence: a scale for every group of units, fitted to measurements.

Small errors of different weights add up in the divergence, and each grows with the square of its
size, so the divergence is about a sum over the units; what a unit's relative squared error costs
depends on where in the model it is. A group's cost is ``slope * error + offset``: the offset is
what does not depend on the type, such as the rounding of its inputs to 8 bits in llama.cpp's
products with quantized weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen35.tuning.units import Unit

__all__ = ["CostFit", "Probe", "UnitGroup", "fit", "group_units", "rank_correlation"]

Errors = Mapping[str, Mapping[str, float]]
"""Unit to choice to relative squared error."""


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind in neighbouring layers, whose scale is measured together."""

    name: str
    units: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """A measurement: one group stored as `choice`, everything else exact.

    Args:
        group: its name.
        choice: a type.
        kld: mean divergence in nats.
    """

    group: str
    choice: str
    kld: float


@dataclass(frozen=True)
class CostFit:
    """What units cost.

    Args:
        slopes: group to nats for a relative squared error of 1.
        offsets: group to nats for being quantized at all.
        costs: unit to choice to nats.
    """

    slopes: Mapping[str, float]
    offsets: Mapping[str, float]
    costs: Mapping[str, Mapping[str, float]]


def group_units(units: Sequence[Unit], most: int) -> list[UnitGroup]:
    """Put units of a kind in neighbouring layers together, until there are `most` groups or fewer.

    No kind is joined with another, so there are at least as many groups as kinds.
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


def fit(
    groups: Sequence[UnitGroup], probes: Sequence[Probe], errors: Errors, exact: Mapping[str, float]
) -> CostFit:
    """Fit every group's slope and offset to its probes.

    Args:
        groups: together all units.
        probes: any number for a group; without one its slope is the mean of all slopes.
        errors: of every unit and choice.
        exact: choices that leave the input as it is, to what they cost: nothing, as a rule.
    """
    by_group: dict[str, list[Probe]] = defaultdict(list)
    for probe in probes:
        by_group[probe.group].append(probe)
    fitted = {
        group.name: _line([(_error(group, p.choice, errors), p.kld) for p in by_group[group.name]])
        for group in groups
        if by_group[group.name]
    }
    mean = sum(slope for slope, _ in fitted.values()) / len(fitted) if fitted else 1.0
    costs: dict[str, dict[str, float]] = {}
    for group in groups:
        slope, offset = fitted.setdefault(group.name, (mean, 0.0))
        for unit in group.units:
            share = offset / len(group.units)
            costs[unit] = {
                choice: exact.get(choice, slope * error + share)
                for choice, error in errors[unit].items()
            }
    slopes = {name: slope for name, (slope, _) in fitted.items()}
    return CostFit(slopes, {name: offset for name, (_, offset) in fitted.items()}, costs)


def _error(group: UnitGroup, choice: str, errors: Errors) -> float:
    return sum(errors[unit][choice] for unit in group.units)


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return slope and offset, neither negative, of a line through points (error, divergence).

    Two points give the line through them, more the least squares of relative deviations; where that
    falls below zero at either end, the line through the origin or the level one takes its place.
    """
    weights = [1.0 / max(y, 1e-12) ** 2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    through_origin = sum(w * x * y for w, (x, y) in zip(weights, points, strict=True))
    squares = sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
    origin = (max(through_origin, 0.0) / squares if squares else 0.0, 0.0)
    if spread <= 1e-12 * squares:
        return origin
    moved = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    slope = moved / spread
    offset = mean_y - slope * mean_x
    if offset < 0:
        return origin
    return (slope, offset) if slope >= 0 else (0.0, max(mean_y, 0.0))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation of two series; 0 for fewer than two values.

    >>> rank_correlation([1, 2, 3], [10, 20, 25])
    1.0
    """
    a, b = _ranks(first), _ranks(second)
    if len(a) < 2:
        return 0.0
    middle = (len(a) - 1) / 2
    norm = (sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b)) ** 0.5
    moved = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    return moved / norm if norm else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 0; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            ranks[place] = (start + end) / 2
        start = end + 1
    return ranks
