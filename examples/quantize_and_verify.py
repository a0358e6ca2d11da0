"""Write NF4, check every number and byte, and reproduce it.

python examples/quantize_and_verify.py [MODEL OUT]
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import qwen35

TINY = Path(__file__).parent.parent / "assets" / "qwen3.5-tiny"


def main(model: str, out: str) -> None:
    """Quantize, verify, reproduce."""
    result = qwen35.convert(model, out, recipe="nf4", keep=["linear_attn.in_proj_a"])
    packed = result.to_json()["nf4"]
    print(f"{result.out.name}: {result.nbytes:,} bytes, {packed} weights in NF4")

    verdict = qwen35.verify(out, source=model)
    for finding in verdict.findings:
        print(f"{finding.subject}: {finding.message}")
    worst = max(row.relative for row in verdict.errors)
    print(f"passed: {verdict.passed}; largest relative error of a role: {worst:.3f}")

    again = qwen35.reproduce(out, source=model)
    print(f"{len(again.files)} files made again, {len(again.findings)} differ")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        with TemporaryDirectory() as folder:
            main(str(TINY), f"{folder}/out")
