"""Bands for FP8: what is good, what is a warning, what must not ship.

``derived`` judges by what the format can do, whatever the magnitude of the weights (docs/fp8.md
has the derivation); ``documented`` are the absolute bands of the toolkit before us. E4M3 reaches a
cosine of 0.99966 on bell-shaped weights, so the documented 0.9997 is out of its reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from qwen35.codecs.fp8.error_sums import WORST_ERROR, ErrorSums

__all__ = ["BANDS", "WORST_ERROR", "Band", "BandMetric", "judge", "worse"]

Band = Literal["GOOD", "WARN", "FAIL"]

TYPICAL_ERROR = 0.03
"""Relative: rounding alone costs 0.023 to 0.027, on uniform as on heavy-tailed weights."""


@dataclass(frozen=True)
class BandMetric:
    """One row of the report.

    Args:
        name: as the report calls it.
        value: of a tensor, as shown.
        good: the bound of what is good.
        limit: the bound of what may ship.
        typical: the typical range, as text.
        hard: the hard limit, as text.
        judged: of a tensor, what is compared with the bounds; `value` when None.
        rises: whether more is better.
        largest: whether the report shows the largest value of all tensors, and not the mean.
    """

    name: str
    value: Callable[[ErrorSums], float]
    good: float
    limit: float
    typical: str
    hard: str
    judged: Callable[[ErrorSums], float] | None = None
    rises: bool = False
    largest: bool = False

    def band(self, tensors: Iterable[ErrorSums]) -> Band:
        """Judge the mean or the largest of some tensors."""
        judged = [(self.judged or self.value)(errors) for errors in tensors]
        found = max(judged) if self.largest else sum(judged) / len(judged)
        sign = -1 if self.rises else 1
        if sign * found <= sign * self.good:
            return "GOOD"
        return "WARN" if sign * found <= sign * self.limit else "FAIL"


def _cosine(errors: ErrorSums) -> float:
    return errors.cosine


def _mae(errors: ErrorSums) -> float:
    return errors.mae


def _worst(errors: ErrorSums) -> float:
    return errors.worst


def _relative_mae(errors: ErrorSums) -> float:
    return errors.mae / errors.mean_magnitude if errors.mean_magnitude else 0.0


def _relative_rmse(errors: ErrorSums) -> float:
    return errors.relative_rmse


def _beyond(errors: ErrorSums) -> float:
    """Return 2 if a code is misplaced, 1 if one saturates, 0 if all is rounding."""
    return 2 if errors.misplaced else 1 if errors.clipped else 0


_GOOD_COSINE = 1 - TYPICAL_ERROR**2 / 2
_LEAST_COSINE = 1 - WORST_ERROR**2 / 2
"""An error r at right angles to the weights turns them by r: cos r = 1 - r^2 / 2."""

_DERIVED = (
    BandMetric(
        "cosine sim",
        _cosine,
        _GOOD_COSINE,
        _LEAST_COSINE,
        f"{_GOOD_COSINE:.5f}–...",
        f"≥ {_LEAST_COSINE:.5f}",
        rises=True,
    ),
    BandMetric(
        "relative RMSE", _relative_rmse, TYPICAL_ERROR, WORST_ERROR, "0.02–0.03", f"≤ {WORST_ERROR}"
    ),
    BandMetric(
        "mean abs err",
        _mae,
        TYPICAL_ERROR,
        WORST_ERROR,
        "2–3% of |w|",
        "≤ 6.25% of |w|",
        judged=_relative_mae,
    ),
    BandMetric(
        "worst RMSE",
        _relative_rmse,
        TYPICAL_ERROR,
        WORST_ERROR,
        "",
        f"≤ {WORST_ERROR}",
        largest=True,
    ),
    BandMetric(
        "worst MaxAE", _worst, 0, 1, "no clipping", "no code astray", judged=_beyond, largest=True
    ),
)

_DOCUMENTED = (
    BandMetric("cosine sim", _cosine, 0.9997, 0.9995, "0.9997–...", "≥ 0.9995", rises=True),
    BandMetric("mean abs err", _mae, 8e-4, 1e-3, "0.0004–0.0008", "≤ 0.001"),
    BandMetric("worst MAE", _mae, 8e-4, 1e-3, "", "≤ 0.001", largest=True),
    BandMetric("worst MaxAE", _worst, 0.01, 0.02, "", "≤ 0.02", largest=True),
)

BANDS: dict[str, tuple[BandMetric, ...]] = {"derived": _DERIVED, "documented": _DOCUMENTED}
"""Name to the metrics by which a tensor is judged."""

_ORDER: tuple[Band, ...] = ("GOOD", "WARN", "FAIL")


def worse(*bands: Band) -> Band:
    """Return the worst of some bands; GOOD of none."""
    return max(bands, key=_ORDER.index, default="GOOD")


def judge(errors: ErrorSums, metrics: tuple[BandMetric, ...]) -> Band:
    """Return the worst band of one tensor's metrics."""
    return worse(*(metric.band([errors]) for metric in metrics))
