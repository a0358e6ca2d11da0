"""The result of comparing one weight with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from qwen35.errors import Finding

if TYPE_CHECKING:
    from qwen35.array_types import F32
    from qwen35.codecs.refined_bounds import OutputErrors

__all__ = ["WeightComparison"]


@dataclass
class WeightComparison:
    """The comparison of one weight with its original.

    Args:
        subject: the subject of its findings.
        squared: sum of squared differences.
        norm: sum of squares of the original.
        errors: further error measures of the codec, as plain values.
        identical: whether the stored bytes equal those of the source.
        judged: whether the comparison completed.
        findings: the problems found.
        refined: whether the weight may have refined codes, which are not the nearest.
        searched: whether its scales may have been searched too.
        outputs: adds up its errors in outputs, if they are to be judged too; not a plain value.
    """

    subject: str = ""
    squared: float = 0.0
    norm: float = 0.0
    errors: Mapping[str, float] | None = None
    identical: bool = False
    judged: bool = False
    findings: list[Finding] = field(default_factory=list)
    refined: bool = False
    searched: bool = False
    outputs: OutputErrors | None = None

    def found(self, check: str, message: str, subject: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(check, subject or self.subject, message))

    def add(self, got: F32, expected: F32) -> None:
        """Accumulate the differences of flat arrays."""
        import numpy as np

        # float64: float32 sums over millions of squares lose the digits that verdicts depend on.
        difference = (got - expected).astype(np.float64)
        self.squared += float(difference @ difference)
        wide = expected.astype(np.float64)
        self.norm += float(wide @ wide)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain values, with exact floats."""
        return asdict(replace(self, outputs=None))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Restore a comparison from `to_json`.

        Raises:
            TypeError, KeyError, ValueError, AttributeError: `value` has another form.
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
            bool(value.get("refined")),
            bool(value.get("searched")),
        )
