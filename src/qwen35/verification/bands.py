"""Bands for FP8: GOOD, WARN and FAIL.

``derived`` bands follow from the format and do not depend on the magnitude of the weights
(derivation in docs/fp8.md); ``documented`` are the absolute bands of the earlier toolkit. E4M3
reaches a cosine of 0.99966 on bell-shaped weights, so the documented 0.9997 is unreachable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from qwen35.codecs.fp8.error_sums import WORST_ERROR, ErrorSums

__all__ = ["BANDS", "WORST_ERROR", "Band", "BandMetric", "judge", "worse"]

Band = Literal["GOOD", "WARN", "FAIL"]

TYPICAL_ERROR = 0.03
"""Rounding alone has a relative error of 0.023 to 0.027, on uniform and heavy-tailed weights."""


@dataclass(frozen=True)
class BandMetric:
    """One row of the report.

    Args:
        name: its name in the report.
        value: the value that is shown for a tensor.
        good: bound of GOOD.
        limit: bound of WARN.
        typical: the typical range, as text.
        hard: the hard limit, as text.
        judged: the value that is compared with the bounds; by default `value`.
        rises: larger values are better.
        largest: the report shows the largest value of all tensors, not the mean.
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
        """Judge the mean or the largest value of some tensors."""
        values = [(self.judged or self.value)(errors) for errors in tensors]
        value = max(values) if self.largest else sum(values) / len(values)
        sign = -1 if self.rises else 1
        if sign * value <= sign * self.good:
            return "GOOD"
        return "WARN" if sign * value <= sign * self.limit else "FAIL"


def _cosine(errors: ErrorSums) -> float:
    return errors.cosine


def _mae(errors: ErrorSums) -> float:
    return errors.mae


def _worst(errors: ErrorSums) -> float:
    return errors.worst


def _judged_cosine(errors: ErrorSums) -> float:
    return 1 - (1 - errors.cosine) / errors.allowed**2


def _relative_mae(errors: ErrorSums) -> float:
    relative = errors.mae / errors.mean_magnitude if errors.mean_magnitude else 0.0
    return relative / errors.allowed


def _judged_rmse(errors: ErrorSums) -> float:
    return errors.relative_rmse / errors.allowed


def _relative_rmse(errors: ErrorSums) -> float:
    return errors.relative_rmse


def _beyond(errors: ErrorSums) -> float:
    """Return 2 if a code is misplaced, 1 if one saturates, 0 if all errors are rounding."""
    return 2 if errors.misplaced else 1 if errors.clipped else 0


_GOOD_COSINE = 1 - TYPICAL_ERROR**2 / 2
_LEAST_COSINE = 1 - WORST_ERROR**2 / 2
"""An error r at right angles to the weights turns them by an angle of cosine 1 - r^2 / 2."""

_DERIVED = (
    BandMetric(
        "cosine sim",
        _cosine,
        _GOOD_COSINE,
        _LEAST_COSINE,
        f"{_GOOD_COSINE:.5f}–...",
        f"≥ {_LEAST_COSINE:.5f}",
        judged=_judged_cosine,
        rises=True,
    ),
    BandMetric(
        "relative RMSE",
        _relative_rmse,
        TYPICAL_ERROR,
        WORST_ERROR,
        "0.02–0.03",
        f"≤ {WORST_ERROR}",
        judged=_judged_rmse,
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
        judged=_judged_rmse,
        largest=True,
    ),
    BandMetric(  # saturation alone is a warning: the file is what --calib-mode asked for
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
"""Name of the bands to their metrics."""

_ORDER: tuple[Band, ...] = ("GOOD", "WARN", "FAIL")


def worse(*bands: Band) -> Band:
    """Return the worst of some bands; GOOD if there are none."""
    return max(bands, key=_ORDER.index, default="GOOD")


def judge(errors: ErrorSums, metrics: tuple[BandMetric, ...]) -> Band:
    """Return the worst band of one tensor's metrics."""
    return worse(*(metric.band([errors]) for metric in metrics))
