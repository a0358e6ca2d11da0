"""What a comparison with the source comes to: for one weight, and for all weights of a role."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from qwen35.codecs.fp8_errors import Errors
from qwen35.errors import Finding

__all__ = ["Compared", "RoleError", "by_role"]


@dataclass
class Compared:
    """One weight beside its original.

    Args:
        squared: sum of squared differences.
        norm: sum of squared weights of the original.
        fp8: more of an FP8 weight's differences.
        identical: whether the stored bytes are those of the source.
        judged: whether it was compared to the end.
        findings: what is wrong with it.
    """

    squared: float = 0.0
    norm: float = 0.0
    fp8: Errors | None = None
    identical: bool = False
    judged: bool = False
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values, floats exact."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return what `to_json` was called on."""
        fp8 = value["fp8"]
        findings = [Finding(**row) for row in value["findings"]]
        return cls(**{**value, "fp8": fp8 and Errors(**fp8), "findings": findings})


@dataclass
class RoleError:
    """Errors of all weights of one role.

    Args:
        role: as recipes name it.
        storage: how the artifact holds these weights.
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
        """Root of the summed squares over that of the source."""
        return _ratio(self.squared, self.norm)

    def add(self, squared: float, norm: float) -> None:
        """Count one weight."""
        self.count += 1
        self.squared += squared
        self.norm += norm
        self.worst = max(self.worst, _ratio(squared, norm))


def _ratio(squared: float, norm: float) -> float:
    if norm == 0:
        return 0.0 if squared == 0 else math.inf
    return math.sqrt(squared / norm)


def by_role(compared: Iterable[tuple[str, str, Compared]]) -> list[RoleError]:
    """Add up weights, each with its role and storage, in the order given."""
    rows: dict[tuple[str, str], RoleError] = {}
    for role, storage, one in compared:
        rows.setdefault((role, storage), RoleError(role, storage)).add(one.squared, one.norm)
    return list(rows.values())
