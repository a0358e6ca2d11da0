"""Compare GGUF types by size and by divergence from the unquantized model.

python examples/gguf_by_quality.py [MODEL OUT TEXT]
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import qwen35

ASSETS = Path(__file__).parent.parent / "assets" / "qwen3.5-tiny"


def main(model: str, out: str, text: str, chunks: int | None = None) -> None:
    """Write the files and compare them with the model, layer by layer: without llama.cpp."""
    result = qwen35.gguf(model, out, types=["Q8_0", "Q4_K_M"])
    candidates = [result.out / file.name for file in result.plan.files]
    report = qwen35.evaluate(model, candidates, text=text, chunks=chunks, streamed=True)
    for row in report.candidates:
        kld, same = row.comparison.kld.value, row.comparison.same_top.value
        size = row.model.nbytes
        print(f"{row.model.name:<28} {size:>13,} bytes  {kld:.6f} nats  same top {same:.1%}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        model, out, text = sys.argv[1:]
        main(model, out, text)
    else:
        with TemporaryDirectory() as folder:
            main(str(ASSETS), f"{folder}/gguf", str(ASSETS / "eval.txt"), chunks=1)
