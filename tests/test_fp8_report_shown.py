"""The FP8 report as a summary and as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fp8_reports import ASTRAY, SEARCH, errors, packed, report_of, report_on
from qwen35.cli.main import main
from qwen35.codecs.fp8.error_sums import ErrorSums
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import Finding
from qwen35.verification.bands import BANDS
from qwen35.verification.documented_advice import documented_advice
from qwen35.verification.fp8_display import report_text

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
UP = f"{LAYER}.3.mlp.up_proj.weight"
DOWN = UP.replace("up_proj", "down_proj")


def test_json_report_is_plain_and_complete(
    fp8_sources: dict[float, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(fp8_sources[0.02]), str(tmp_path / "out"), "--recipe", "fp8"]
    assert main([*arguments, "--quiet", "--json", "--verify-samples", "3"]) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert (report["verdict"], report["bands"]) == ("GOOD", "derived")
    assert report["checked"] == {"GOOD": 3, "WARN": 0, "FAIL": 0}
    assert set(report["metrics"]) == {m.name for m in BANDS["derived"]}
    assert len(report["tensors"]) == 3


LINES = [
    r"={64}",
    r"  QUANTIZATION VERIFICATION SUMMARY",
    r"  Calibration         : max",
    r"-{64}",
    r"  Shards processed    : 1  \(0 failed\)",
    r"  FP8 weight tensors  : 32",
    r"  Passthrough tensors : 71  .*",
    r"  Spot-checked        : 32  \(✔ 32 GOOD  ⚠ 0 WARN  ✘ 0 FAIL\)",
    r"-{64}",
    r"  metric          mean value  typical range  +band +hard limit",
    r"  -{63}",
    r"  cosine sim      0\.\d{6}    0\.\d+–\.\.\. +✔ GOOD +≥ 0\.\d+",
    r"  relative RMSE   0\.\d{6} .*✔ GOOD +≤ 0\.\d+",
    r"  mean abs err    0\.\d{6} .*✔ GOOD .*",
    r"  worst RMSE      0\.\d{6} +✔ GOOD +≤ 0\.\d+",
    r"  worst MaxAE     0\.\d{6} .*✔ GOOD .*",
    r"-{64}",
    r"✔  All metrics within typical range. Model ready for inference.",
    r"={64}",
]


# --- layout of the summary


def test_summary_has_the_layout_of_the_toolkit_before(
    fp8_sources: dict[float, Path], fp8_outputs: dict[tuple[float, str], Path]
) -> None:
    text = report_text(report_on(fp8_outputs[0.02, "max"], fp8_sources[0.02], ScaleChoice("max")))
    lines = text.splitlines()
    for line, pattern in zip(lines, LINES, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_degraded_summary_has_numbered_recommendations(fp8_tails: Path, tmp_path: Path) -> None:
    scale_choice = ScaleChoice("percentile", percentile=99)
    out = packed(fp8_tails, tmp_path / "out", scale_choice)
    lines = report_text(report_on(out, fp8_tails, scale_choice)).splitlines()
    assert lines[2] == "  Calibration         : percentile(p=99)"
    assert "✘  Outside hard limits. Do not deploy." in lines
    at = lines.index("  CALIBRATION RECOMMENDATIONS")
    assert lines[at - 1] == "-" * 64
    assert lines[at + 1].startswith("  1. ")


# --- the whole of it, of errors by hand


def test_the_worst_is_in_the_worst_band_first_and_then_by_its_error() -> None:
    """A code astray fails a weight of little error."""
    report = report_of("search", {UP: errors(0.06), QKV: errors(0.01, clipped=0)})
    assert UP in next(report.recommendations())
    documented = replace(report, bands="documented", errors={UP: errors(0.02), QKV: errors(0.03)})
    assert documented.judged == {"FAIL": 2}
    assert QKV in next(documented.recommendations())


def test_the_whole_summary() -> None:
    report = report_of(
        "rms",
        {UP: errors(0.02), QKV: errors(0.05, clipped=9)},
        Finding("hash", "model.safetensors", "changed"),
        Finding("bytes", DOWN, "3 bytes differ from the source"),
        Finding("plan", "model.safetensors", "not in the plan"),
    )
    assert (
        report_text(report)
        == f"""\
{"=" * 64}
  QUANTIZATION VERIFICATION SUMMARY
  Calibration         : rms(k=3.0)
{"-" * 64}
  Shards processed    : 3  (1 failed)
  FP8 weight tensors  : 5
  Passthrough tensors : 7  (6 byte for byte the source's)
  Spot-checked        : 2  (✔ 1 GOOD  ⚠ 1 WARN  ✘ 0 FAIL)
{"-" * 64}
  metric          mean value  typical range   band    hard limit
  {"-" * 63}
  cosine sim      0.999276    0.99955–...     ⚠ WARN  ≥ 0.99805
  relative RMSE   0.035000    0.02–0.03       ⚠ WARN  ≤ 0.0625
  mean abs err    0.035000    2–3% of |w|     ⚠ WARN  ≤ 6.25% of |w|
  worst RMSE      0.050000                    ⚠ WARN  ≤ 0.0625
  worst MaxAE     0.050000    no clipping     ⚠ WARN  no code astray
✘  model.safetensors: changed
✘  {DOWN}: 3 bytes differ from the source
✘  model.safetensors: not in the plan
{"-" * 64}
✘  Outside hard limits. Do not deploy.
   2 of 5 FP8 weights were checked; others may be worse:
   --verify-samples 5 checks all.
{"-" * 64}
  CALIBRATION RECOMMENDATIONS
  1. 9 weights saturate: raise --rms-factor (now 3) until none does.
  2. {SEARCH}
{"=" * 64}"""
    )


def test_the_whole_json() -> None:
    report = report_of("max", {QKV: errors(0.5, misplaced=2)}, Finding("hash", "x", "changed"))
    assert report.to_json() == {
        "calibration": "max",
        "bands": "derived",
        "verdict": "FAIL",
        "shards": 3,
        "fp8": 5,
        "passthrough": 7,
        "passthrough_identical": 6,
        "source_quantized": {},
        "checked": {"GOOD": 0, "WARN": 0, "FAIL": 1},
        "metrics": {
            "cosine sim": pytest.approx(0.8**0.5),
            "relative RMSE": 0.5,
            "mean abs err": 0.5,
            "worst RMSE": 0.5,
            "worst MaxAE": 0.5,
        },
        "tensors": {
            QKV: {
                "cosine": pytest.approx(0.8**0.5),
                "mae": 0.5,
                "max_ae": 0.5,
                "relative_rmse": 0.5,
                "clipped": 0,
                "misplaced": 2,
                "band": "FAIL",
            }
        },
        "findings": [{"check": "hash", "subject": "x", "message": "changed"}],
        "recommendations": [ASTRAY],
    }
    assert report_of("max", {}).to_json()["metrics"] == {}


def test_metrics_of_zeros_and_of_what_became_of_them() -> None:
    rows = {metric.name: metric for metric in BANDS["derived"]}
    for found, band in ((ErrorSums(count=4), "GOOD"), (ErrorSums(count=4, absolute=1.0), "GOOD")):
        assert rows["mean abs err"].band([found]) == band
    half = ErrorSums(count=4, absolute=0.2, magnitude=8.0)  # 0.05 of weights of 2
    assert rows["mean abs err"].band([half]) == "GOOD"
    assert rows["mean abs err"].band([replace(half, absolute=0.3)]) == "WARN"
    assert rows["mean abs err"].band([replace(half, absolute=0.6)]) == "FAIL"
    pair = [errors(0.01), errors(0.08)]
    assert rows["worst RMSE"].band(pair) == "FAIL"
    assert rows["relative RMSE"].band(pair) == "WARN"
    astray = {1: "WARN", 2: "FAIL"}
    for misplaced, clipped, worst in ((0, 0, 0), (0, 7, 1), (3, 0, 2), (1, 1, 2)):
        found = errors(0.01, clipped=clipped, misplaced=misplaced)
        assert rows["worst MaxAE"].band([found]) == astray.get(worst, "GOOD")


# --- the documented rows beside ours, as the old command prints them


def test_documented_rows_and_advice_stand_beside_ours() -> None:
    found = {UP: errors(0.02), QKV: errors(0.05, clipped=9)}
    lines = report_text(report_of("rms", found), both=True).splitlines()
    documented = lines.index("  cosine sim      0.999276    0.9997–...      ✘ FAIL  ≥ 0.9995")
    assert lines[documented + 1 : documented + 6] == [
        "  mean abs err    0.035000    0.0004–0.0008   ✘ FAIL  ≤ 0.001",
        "  worst MAE       0.050000                    ✘ FAIL  ≤ 0.001",
        "  worst MaxAE     0.050000                    ✘ FAIL  ≤ 0.02",
        "  -- by the rounding of the format ------------------------------",
        "  cosine sim      0.999276    0.99955–...     ⚠ WARN  ≥ 0.99805",
    ]
    verdict = lines.index("⚠  Metrics within hard limits but outside typical range.")
    assert " ".join(" ".join(lines[verdict + 1 :]).split()) == (
        "See calibration recommendations below. "
        "2 of 5 FP8 weights were checked; others may be worse: --verify-samples 5 checks all. "
        "Judged by the derived limits; by the documented ones it is FAIL (--bands documented). "
        f"{'-' * 64} CALIBRATION RECOMMENDATIONS "
        "1. Cosine similarity avg=0.999276 is in the FAIL zone (typical ≥ 0.9997). "
        "Switch to --calib_mode mse for best quality. "
        "2. Mean abs error avg=0.035000 is in the FAIL zone (typical ≤ 0.0008). "
        "Decrease --rms_factor (now 3). Measured: the error grows as it falls; increase it. "
        "3. Max abs error worst=0.050000 is in the FAIL zone (typical ≤ 0.01). "
        "Increase --rms_factor (now 3). "
        "4. 9 weights saturate: raise --rms-factor (now 3) until none does. "
        f"5. {SEARCH} {'=' * 64}"
    )
    assert all(len(line) <= 70 for line in lines)


@pytest.mark.parametrize(
    ("mode", "advice"),
    [
        ("max", "Switch to --calib_mode rms (same speed, outlier-robust) or --calib_mode mse for "),
        ("percentile", "Switch to --calib_mode mse for best quality."),
        ("mse", "Add --activation_stats for the highest quality"),
        ("search", "No mode has less error."),
    ],
)
def test_the_documented_example_of_max(mode: str, advice: str) -> None:
    report = report_of(mode, {UP: replace(errors(0.04), absolute=0.0)})
    (cosine, worst) = documented_advice(report)
    assert cosine.startswith("Cosine similarity avg=0.9992")
    assert "is in the FAIL zone (typical ≥ 0.9997). " + advice in cosine
    assert worst.startswith("Max abs error worst=")


def test_documented_limits_that_agree_are_not_mentioned() -> None:
    report = report_of("max", {UP: ErrorSums(count=4)})
    text = report_text(report, both=True)
    assert "Judged by" not in text
    assert "RECOMMENDATIONS" not in text
    assert list(documented_advice(report_of("max", {}))) == []


def test_a_quantized_source_is_named() -> None:
    report = replace(report_of("max", {UP: errors(0.02)}), quantized={"NF4": 3})
    assert "  Compared with       : a source with 3 weights in NF4, decoded" in report_text(report)
    assert report.to_json()["source_quantized"] == {"NF4": 3}
