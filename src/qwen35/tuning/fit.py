"""Cost model: divergence from squared errors, with a slope per group of units fitted to probes.

For small errors the divergence is close to a sum over the units, each term quadratic in its error;
the cost of a relative squared error depends on where in the model the unit is. A group costs
``slope * error + offset``. The offset is independent of the type, such as llama.cpp's rounding of
inputs to 8 bits in products with quantized weights.
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
    """Units of one kind in neighbouring layers, probed together."""

    name: str
    units: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """A measurement: one group stored as `choice`, everything else exact.

    Args:
        group: name of the group.
        choice: its type.
        kld: mean divergence in nats.
    """

    group: str
    choice: str
    kld: float


@dataclass(frozen=True)
class CostFit:
    """The fitted costs of all units.

    Args:
        slopes: group to nats per relative squared error of 1.
        offsets: group to nats for being quantized at all.
        costs: unit to choice to nats.
    """

    slopes: Mapping[str, float]
    offsets: Mapping[str, float]
    costs: Mapping[str, Mapping[str, float]]


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


def fit(
    groups: Sequence[UnitGroup], probes: Sequence[Probe], errors: Errors, exact: Mapping[str, float]
) -> CostFit:
    """Fit every group's slope and offset to its probes.

    Args:
        groups: cover all units.
        probes: any number per group; a group without probes gets the mean slope.
        errors: of every unit and choice.
        exact: lossless choices to their cost, usually 0.
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

    Two points give the line through them, more the least squares of relative deviations. A negative
    offset is replaced by the line through the origin, a negative slope by a constant.
    """
    weights = [1.0 / max(y, 1e-12) ** 2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    through_origin = sum(w * x * y for w, (x, y) in zip(weights, points, strict=True))
    squares = sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
    origin = (max(through_origin, 0.0) / squares if squares else 0.0, 0.0)
    if spread <= 1e-12 * squares:  # one error only: no slope to be had
        return origin
    covariance = sum(
        w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)
    )
    slope = covariance / spread
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
