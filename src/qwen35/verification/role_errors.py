"""Sums of errors over all weights of a role."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from qwen35.codecs.comparison import WeightComparison

__all__ = ["RoleError", "by_role"]


@dataclass
class RoleError:
    """Errors of all weights of one role.

    Args:
        role: its name in recipes.
        storage: how the artifact stores these weights.
        count: number of weights.
        squared: sum of squared differences.
        norm: sum of squared weights of the source.
        worst: largest relative error of one weight.
    """

    role: str
    storage: str
    count: int = 0
    squared: float = 0.0
    norm: float = 0.0
    worst: float = 0.0

    @property
    def relative(self) -> float:
        """Relative error: root of the summed squared differences over that of the source."""
        return _ratio(self.squared, self.norm)

    def add(self, squared: float, norm: float) -> None:
        """Add one weight."""
        self.count += 1
        self.squared += squared
        self.norm += norm
        self.worst = max(self.worst, _ratio(squared, norm))


def _ratio(squared: float, norm: float) -> float:
    if norm == 0:
        return 0.0 if squared == 0 else math.inf
    return math.sqrt(squared / norm)


def by_role(compared: Iterable[tuple[str, str, WeightComparison]]) -> list[RoleError]:
    """Add up (role, storage, comparison) rows, in order."""
    rows: dict[tuple[str, str], RoleError] = {}
    for role, storage, one in compared:
        rows.setdefault((role, storage), RoleError(role, storage)).add(one.squared, one.norm)
    return list(rows.values())
