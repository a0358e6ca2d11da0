"""The FP8 report as text, in the layout of the earlier toolkit."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap

from qwen35.verification.bands import BANDS, Band, BandMetric
from qwen35.verification.documented_advice import documented_advice
from qwen35.verification.fp8_report import BandsName, Fp8Report

__all__ = ["report_text"]

_WIDTH = 64
_MARKS: dict[Band, str] = {"GOOD": "✔", "WARN": "⚠", "FAIL": "✘"}
_FINAL: dict[Band, str] = {
    "GOOD": "All metrics within typical range. Model ready for inference.",
    "WARN": "Metrics within hard limits but outside typical range.\n"
    "   See calibration recommendations below.",
    "FAIL": "Outside hard limits. Do not deploy.",
}
_OTHER: dict[BandsName, BandsName] = {"derived": "documented", "documented": "derived"}


def report_text(report: Fp8Report, *, both: bool = False) -> str:
    """Render the summary.

    Args:
        report: the report.
        both: show the documented rows and advice beside those that follow from the format.
    """
    return "\n".join(_lines(report, both=both))


def _lines(report: Fp8Report, *, both: bool) -> Iterator[str]:
    judged = report.judged
    counts = "  ".join(f"{_MARKS[band]} {judged[band]} {band}" for band in _MARKS)
    failed = len({f.subject for f in report.findings if f.subject.endswith(".safetensors")})
    yield "=" * _WIDTH
    yield "  QUANTIZATION VERIFICATION SUMMARY"
    yield f"  Calibration         : {report.scale_choice}"
    for label, count in report.quantized.items():
        yield f"  Compared with       : a source with {count} weights in {label}, decoded"
    yield "-" * _WIDTH
    yield f"  Shards processed    : {report.shards}  ({failed} failed)"
    yield f"  FP8 weight tensors  : {report.packed}"
    yield (
        f"  Passthrough tensors : {report.passthrough}  ({report.identical} byte for byte the "
        "source's)"
    )
    yield f"  Spot-checked        : {sum(judged.values())}  ({counts})"
    if report.errors:
        yield "-" * _WIDTH
        yield f"  {'metric':<15} {'mean value':<11} {'typical range':<15} {'band':<7} hard limit"
        yield "  " + "-" * (_WIDTH - 1)
        yield from _tables(report, both=both)
    for finding in report.findings:
        yield f"✘  {finding.subject}: {finding.message}"
    yield "-" * _WIDTH
    yield f"{_MARKS[report.verdict]}  {_verdict(report)}"
    yield from _reservations(report, both=both)
    recommendations = _advice(report, both=both)
    if recommendations:
        yield "-" * _WIDTH
        yield "  CALIBRATION RECOMMENDATIONS"
        for number, text in enumerate(recommendations, 1):
            yield from _item(number, text) if both else [f"  {number}. {text}"]
    yield "=" * _WIDTH


def _tables(report: Fp8Report, *, both: bool) -> Iterator[str]:
    if not both:
        yield from _rows(report, report.metrics)
        return
    yield from _rows(report, BANDS["documented"])
    yield f"  {'-- by the rounding of the format ':-<{_WIDTH - 1}}"
    yield from _rows(report, BANDS["derived"])


def _rows(report: Fp8Report, metrics: tuple[BandMetric, ...]) -> Iterator[str]:
    for metric in metrics:
        band = metric.band(report.errors.values())
        yield (
            f"  {metric.name:<15} {report.value(metric):<11.6f} {metric.typical:<15} "
            f"{_MARKS[band]} {band:<5} {metric.hard}"
        )


def _verdict(report: Fp8Report) -> str:
    if report.verdict == "GOOD" and not report.errors:
        return "No FP8 weight was compared; everything else is as planned."
    return _FINAL[report.verdict]


def _reservations(report: Fp8Report, *, both: bool) -> Iterator[str]:
    """Yield what the verdict does not cover: weights not read, and limits that do not decide."""
    if report.errors and report.unchecked:
        text = (
            f"{len(report.errors)} of {report.packed} FP8 weights were checked; others may be "
            f"worse: --verify-samples {report.packed} checks all."
        )
        yield from wrap(text, _WIDTH, initial_indent="   ", subsequent_indent="   ")
    other = _OTHER[report.bands]
    theirs = report.verdict_by(other)
    if both and report.errors and theirs != report.verdict:
        text = f"Judged by the {report.bands} limits; by the {other} ones it is {theirs}"
        text += f" (--bands {other})."
        yield from wrap(text, _WIDTH, initial_indent="   ", subsequent_indent="   ")


def _advice(report: Fp8Report, *, both: bool) -> list[str]:
    ours = list(report.recommendations())
    return [*documented_advice(report), *ours] if both and ours else ours


def _item(number: int, text: str) -> list[str]:
    return wrap(
        text,
        _WIDTH,
        initial_indent=f"  {number}. ",
        subsequent_indent="     ",
        break_on_hyphens=False,
        break_long_words=False,
    )
