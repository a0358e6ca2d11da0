"""The FP8 report as text, in the layout of the earlier toolkit."""

from __future__ import annotations

from collections.abc import Iterator

from qwen35.verification.bands import Band
from qwen35.verification.fp8_report import Fp8Report

__all__ = ["report_text"]

_WIDTH = 64
_MARKS: dict[Band, str] = {"GOOD": "✔", "WARN": "⚠", "FAIL": "✘"}
_FINAL: dict[Band, str] = {
    "GOOD": "All metrics within typical range. Model ready for inference.",
    "WARN": "Metrics within hard limits but outside typical range.\n"
    "   See calibration recommendations below.",
    "FAIL": "Outside hard limits. Do not deploy.",
}


def report_text(report: Fp8Report) -> str:
    """Render the summary."""
    return "\n".join(_lines(report))


def _lines(report: Fp8Report) -> Iterator[str]:
    judged = report.judged
    counts = "  ".join(f"{_MARKS[band]} {judged[band]} {band}" for band in _MARKS)
    failed = len({f.subject for f in report.findings if f.subject.endswith(".safetensors")})
    yield "=" * _WIDTH
    yield "  QUANTIZATION VERIFICATION SUMMARY"
    yield f"  Calibration         : {report.scale_choice}"
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
        yield from _rows(report)
    for finding in report.findings:
        yield f"✘  {finding.subject}: {finding.message}"
    yield "-" * _WIDTH
    yield f"{_MARKS[report.verdict]}  {_verdict(report)}"
    recommendations = list(report.recommendations())
    if recommendations:
        yield "-" * _WIDTH
        yield "  CALIBRATION RECOMMENDATIONS"
        yield from (f"  {number}. {text}" for number, text in enumerate(recommendations, 1))
    yield "=" * _WIDTH


def _rows(report: Fp8Report) -> Iterator[str]:
    for metric in report.metrics:
        band = metric.band(report.errors.values())
        yield (
            f"  {metric.name:<15} {report.value(metric):<11.6f} {metric.typical:<15} "
            f"{_MARKS[band]} {band:<5} {metric.hard}"
        )


def _verdict(report: Fp8Report) -> str:
    if report.verdict == "GOOD" and not report.errors:
        return "No FP8 weight was compared; everything else is as planned."
    return _FINAL[report.verdict]
