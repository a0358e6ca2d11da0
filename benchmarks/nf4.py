"""Compare NF4 conversion with today's usual route.

    python -m benchmarks.nf4 [--work DIR] [--size 0.8B|tiny] [--rounds 3]

Makes a random checkpoint with real shapes and measures processes, in turn: `qwen35 convert`, with
all processors and with one; the route through transformers and bitsandbytes (load with a config,
save); `cp` of the weights; `import torch`, which the conversion avoids; the conversion of the
embedded checkpoint with Numba's cache of kernels and with an empty one, which shows start-up and
the time to compile. CPU time and peak memory are the operating system's, for the whole process.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.measuring import (
    ASSET,
    QWEN35,
    Comparison,
    Cost,
    arguments,
    made,
    measure,
    report,
    weights,
)

TRANSFORMERS = """
import sys, torch
from transformers import BitsAndBytesConfig, Qwen3_5ForConditionalGeneration
config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
    llm_int8_skip_modules=["lm_head", "model.visual", "model.language_model.embed_tokens"],
)
model = Qwen3_5ForConditionalGeneration.from_pretrained(
    sys.argv[1], quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
)
model.save_pretrained(sys.argv[2])
"""
OURS, ONE, THEIRS, COPY = (
    "`convert --recipe nf4`",
    "`convert --recipe nf4`, one thread",
    "transformers + bitsandbytes",
    "`cp` of the source's weights",
)
COMPARISONS = (
    Comparison(OURS, THEIRS, headline=True),
    Comparison(OURS, ONE, ("wall",)),
    Comparison(OURS, COPY, ("wall", "cpu")),
)


def convert(source: Path, out: Path, *flags: str) -> list[object]:
    """Return the command that converts `source`."""
    return [*QWEN35, "convert", "--recipe", "nf4", "--quiet", *flags, source, out]


def once(source: Path, work: Path) -> dict[str, Cost]:
    """Measure every route once."""
    ours, theirs, copy, cache = (work / name for name in ("ours", "theirs", "copy", "kernels"))
    copy.mkdir(exist_ok=True)
    tiny, compiled = convert(ASSET, ours), {"NUMBA_CACHE_DIR": str(cache)}
    shutil.rmtree(cache, ignore_errors=True)
    costs = {
        "`convert` of the embedded checkpoint": measure(tiny, ours),
        "the same, kernels not compiled yet": measure(tiny, ours, compiled),
        "`import torch`": measure([sys.executable, "-c", "import torch"]),
        COPY: measure(["cp", *weights(source), copy]),
        OURS: measure(convert(source, ours), ours),
        THEIRS: measure([sys.executable, "-c", TRANSFORMERS, source, theirs], theirs),
        ONE: measure(convert(source, ours, "--threads", "1"), ours),
    }
    for folder in (ours, theirs, copy, cache):
        shutil.rmtree(folder)
    return costs


def main() -> None:
    args = arguments(__doc__)
    source = made("checkpoint", args.size, args.work)
    measure(convert(source, args.work / "ours"), args.work / "ours")  # warms all caches
    title = f"NF4, {source.name}"
    report(args, title, lambda: once(source, args.work), COMPARISONS)


if __name__ == "__main__":
    main()
