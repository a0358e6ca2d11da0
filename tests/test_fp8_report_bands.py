"""The documented bands of the FP8 report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fp8_reports import DEVIATIONS, report_on
from qwen35.cli.main import main
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.verification.bands import BANDS

pytestmark = pytest.mark.sentences


def test_documented_bands_are_those_of_the_document() -> None:
    rows = {m.name: (m.good, m.limit) for m in BANDS["documented"]}
    assert rows == {
        "cosine sim": (0.9997, 0.9995),
        "mean abs err": (0.0008, 0.001),
        "worst MAE": (0.0008, 0.001),
        "worst MaxAE": (0.01, 0.02),
    }


def test_documented_bands_judge_by_magnitude(
    fp8_sources: dict[float, Path], fp8_outputs: dict[tuple[float, str], Path]
) -> None:
    """So the same quantizer passes and fails; E4M3 reaches no cosine of 0.9997."""
    verdicts = {}
    for deviation in DEVIATIONS:
        out = fp8_outputs[deviation, "max"]
        report = report_on(out, fp8_sources[deviation], ScaleChoice("max"), bands="documented")
        verdicts[deviation] = report.verdict
        cosine = report.metrics[0]
        assert 0.9995 < report.value(cosine) < 0.9997
        assert cosine.band(report.errors.values()) == "WARN"
    assert verdicts == {0.002: "WARN", 0.02: "WARN", 0.2: "FAIL"}


def test_exit_code_follows_the_bands_asked_for(
    fp8_sources: dict[float, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", "fp8", "--quiet", "--calib-mode", "max", "--bands", "documented"]
    warn = ["convert", str(fp8_sources[0.02]), str(tmp_path / "a"), *arguments]
    assert main(warn) == 0
    assert "⚠  Metrics within hard limits" in capsys.readouterr().out
    fail = ["convert", str(fp8_sources[0.2]), str(tmp_path / "b"), *arguments]
    assert main(fail) == 1
    text = capsys.readouterr().out
    assert "worst MAE" in text
    assert re.search(r"worst MaxAE .*✘ FAIL", text)
