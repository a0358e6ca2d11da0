"""Find a GGUF recipe for a number of bits per weight, from a short text.

python examples/tuned.py [MODEL RECIPE TEXT SIZE]
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import qwen35

TYPES = ["q4_K", "q5_K", "q6_K"]  # fewer types take less time
ASSETS = Path(__file__).parent.parent / "assets" / "qwen3.5-tiny"


def main(model: str, recipe: str, text: str, size: str = "5bpw") -> None:
    """Tune, then plan with the recipe."""
    result = qwen35.tune(
        model, format="gguf", size=size, text=text, output=recipe, types=TYPES, chunks=2
    )
    bits = 8 * result.tuned.nbytes / result.space.weights
    print(f"{result.recipe.name}: {result.tuned.nbytes:,} bytes, {bits:.2f} bits a weight")
    planned = qwen35.gguf(model, "unused", types="Q4_K_M", recipe=recipe, dry_run=True)
    kinds = sorted({target.op for step in planned.plan.steps for target in step.targets})
    print(f"types used: {', '.join(kinds)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        with TemporaryDirectory() as folder:
            main(str(ASSETS), f"{folder}/tuned.toml", str(ASSETS / "eval.txt"))
