"""What a comparison with the source comes to, for one weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from qwen35.errors import Finding

if TYPE_CHECKING:
    from qwen35.array_types import F32

__all__ = ["WeightComparison"]


@dataclass
class WeightComparison:
    """One weight beside its original.

    Args:
        subject: what findings call it.
        squared: sum of squared differences.
        norm: sum of squared weights of the original.
        errors: more of the differences, as plain values, if its codec tells them.
        identical: whether the stored bytes are those of the source.
        judged: whether it was compared to the end.
        findings: what is wrong with it.
    """

    subject: str = ""
    squared: float = 0.0
    norm: float = 0.0
    errors: Mapping[str, float] | None = None
    identical: bool = False
    judged: bool = False
    findings: list[Finding] = field(default_factory=list)

    def found(self, check: str, message: str, subject: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(check, subject or self.subject, message))

    def add(self, got: F32, expected: F32) -> None:
        """Add up the differences of flat arrays, in float64."""
        import numpy as np

        difference = (got - expected).astype(np.float64)
        self.squared += float(difference @ difference)
        wide = expected.astype(np.float64)
        self.norm += float(wide @ wide)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values, floats exact."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return what `to_json` was called on.

        Raises:
            TypeError, KeyError, ValueError, AttributeError: nothing of the kind.
        """
        errors = value["errors"]
        return cls(
            str(value["subject"]),
            float(value["squared"]),
            float(value["norm"]),
            None if errors is None else {str(name): value + 0 for name, value in errors.items()},
            bool(value["identical"]),
            bool(value["judged"]),
            [Finding(**{str(k): str(v) for k, v in row.items()}) for row in value["findings"]],
        )
