"""Advice on an FP8 report as the earlier toolkit documents it, with what measurements say of it.

Its README advises by metric and mode. Some of it does not hold for E4M3, a floating format: the
step of most codes follows the value, so a smaller scale gains nothing and saturates more weights.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.verification.bands import BANDS
from qwen35.verification.fp8_report import Fp8Report

__all__ = ["documented_advice"]

_NAMES = {
    "cosine sim": "Cosine similarity avg",
    "mean abs err": "Mean abs error avg",
    "worst MAE": "Mean abs error worst",
    "worst MaxAE": "Max abs error worst",
}
_BEST = "Switch to --calib_mode mse for best quality."


def documented_advice(report: Fp8Report) -> Iterator[str]:
    """Yield the advice on each documented metric that is not GOOD."""
    off = {}
    for metric in BANDS["documented"] if report.errors else ():
        band = metric.band(report.errors.values())
        if band != "GOOD":
            off[metric.name] = metric, band
    if "mean abs err" in off:  # the advice would be the same
        off.pop("worst MAE", None)
    for metric, band in off.values():
        sign = "≥" if metric.rises else "≤"
        yield (
            f"{_NAMES[metric.name]}={report.value(metric):.6f} is in the {band} zone "
            f"(typical {sign} {metric.good:g}). {_advice(metric.name, report.scale_choice)}"
        )


def _advice(metric: str, choice: ScaleChoice) -> str:
    if choice.mode == "max":
        return (
            "Switch to --calib_mode rms (same speed, outlier-robust) or --calib_mode mse for best "
            "quality. Measured: rms saturates the outliers and has the larger error."
        )
    if choice.mode == "rms" and metric == "worst MaxAE":
        return f"Increase --rms_factor (now {choice.rms_factor:g})."
    if choice.mode == "rms" and metric != "cosine sim":
        return (
            f"Decrease --rms_factor (now {choice.rms_factor:g}). Measured: the error grows as it "
            "falls; increase it."
        )
    if choice.mode == "mse":
        return "Add --activation_stats for the highest quality, if they were not given."
    return _BEST if choice.mode != "search" else "No mode has less error."
