"""Collect activation statistics and use them for FP8 and GGUF.

python examples/calibrated.py [MODEL FOLDER TEXT]
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import qwen35

ASSETS = Path(__file__).parent.parent / "assets" / "qwen3.5-tiny"


def main(model: str, folder: str, text: str, chunks: int | None = None) -> None:
    """Calibrate, then write FP8 and GGUF with the statistics."""
    calibration = qwen35.calibrate(model, text=text, output=f"{folder}/statistics", chunks=chunks)
    statistics = calibration.result.out
    print(f"statistics: {', '.join(sorted(calibration.result.hashes))}")

    fp8 = qwen35.convert(
        model,
        f"{folder}/fp8",
        recipe="fp8",
        calib_mode="search",
        activation_stats=statistics / "activation-stats.json",
    )
    assert fp8.report is not None
    print(f"FP8: {fp8.report.verdict}, {fp8.report.packed} weights")

    imatrix = statistics / "imatrix.gguf"
    gguf = qwen35.gguf(model, f"{folder}/gguf", types="Q4_K_M", imatrix=imatrix)
    print(f"GGUF: {', '.join(gguf.hashes)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        model, out, text = sys.argv[1:]
        main(model, out, text)
    else:
        with TemporaryDirectory() as temporary:
            main(str(ASSETS), temporary, str(ASSETS / "eval.txt"), chunks=2)
