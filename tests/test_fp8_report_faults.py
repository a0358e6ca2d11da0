"""The FP8 report fails on planted faults, and where saturation costs too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp8_reports import DEVIATIONS, FAULTS, MODES, edited, packed, report_on
from qwen35.cli.main import main
from qwen35.codecs.devices import Kernels
from qwen35.codecs.fp8.arrays import encode_rows
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.verification.fp8_display import report_text

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
UP = f"{LAYER}.3.mlp.up_proj.weight"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("deviation", "mode"), [(d, m) for d in DEVIATIONS for m in MODES if m != "mse" or d == 0.02]
)
def test_planted_fault_fails_at_any_magnitude(
    deviation: float,
    fault: str,
    mode: Any,
    fp8_sources: dict[float, Path],
    fp8_outputs: dict[tuple[float, str], Path],
    tmp_path: Path,
) -> None:
    broken = edited(fp8_outputs[deviation, mode], tmp_path / "broken", FAULTS[fault])
    report = report_on(broken, fp8_sources[deviation], ScaleChoice(mode))
    assert report.verdict == "FAIL"
    assert QKV in report_text(report) or report.judged["FAIL"]
    if report.judged["FAIL"]:
        failed = {n for n, row in report.to_json()["tensors"].items() if row["band"] == "FAIL"}
        assert failed == ({UP, UP.replace("up_", "gate_")} if "swapped" in fault else {QKV})


@pytest.mark.parametrize("fault", ["doubled", "transposed", "shifted", "zeroed", "shuffled"])
def test_a_faulty_encoder_makes_convert_exit_with_one(
    fault: str,
    fp8_sources: dict[float, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(
        values: Any, dtype: str, scale_choice: Any, weights: Any, codes: Any, out: Any
    ) -> bool:
        finite = encode_rows(values, dtype, scale_choice, weights, codes, out)
        if fault == "doubled":
            out += 0x80
        elif fault == "transposed":
            out[:] = out.T.reshape(out.shape)
        elif fault == "shifted":
            out[:] = np.roll(out, 1, 0)
        elif fault == "zeroed":
            out[:] = 0
        else:
            codes[:] = codes[::-1].copy()
        return finite

    monkeypatch.setattr("qwen35.writing.write.kernels_for", lambda *_: (Kernels({"fp8": broken}),))
    out = tmp_path / "out"
    assert main(["convert", str(fp8_sources[0.02]), str(out), "--recipe", "fp8", "--quiet"]) == 1
    text = capsys.readouterr().out
    assert "✘  Outside hard limits. Do not deploy." in text
    assert main(["verify", str(out), "--source", str(fp8_sources[0.02]), "--quiet"]) == 1


def test_saturation_fails_where_it_costs_more_than_any_rounding(
    fp8_tails: Path, tmp_path: Path
) -> None:
    out = packed(fp8_tails, tmp_path / "out", ScaleChoice("rms"))
    report = report_on(out, fp8_tails, ScaleChoice("rms"))
    assert report.verdict == "FAIL"
    assert not any(e.misplaced for e in report.errors.values())
    assert all(e.clipped for e in report.errors.values())


def test_a_little_saturation_is_a_warning(fp8_sources: dict[float, Path], tmp_path: Path) -> None:
    scale_choice = ScaleChoice("percentile", percentile=99.95)
    out = packed(fp8_sources[0.02], tmp_path / "out", scale_choice)
    assert report_on(out, fp8_sources[0.02], scale_choice).verdict == "WARN"
