"""Compare calibration with a forward pass of the model loaded whole.

    python -m benchmarks.calibrate [--work DIR] [--size 0.8B|tiny] [--rounds 3] [--windows 4]

Makes a random checkpoint with real shapes and measures processes, in turn: `qwen35 calibrate`, and
transformers loading the model and running it over the same windows of 512 tokens, both without
logits. Start-up is measured on one window of the embedded checkpoint, and subtracted where that
is said. benchmarks/importance.py measures what calibration is good for.
"""

from __future__ import annotations

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
    remove,
    report,
)

WHOLE = """
import sys
import numpy as np
import torch, transformers
transformers.logging.disable_progress_bar()
torch.set_num_threads(int(sys.argv[4]))
kind = transformers.AutoModelForImageTextToText
model = kind.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
with torch.inference_mode():
    for window in np.load(sys.argv[2])[: int(sys.argv[3])]:
        model(input_ids=torch.from_numpy(window)[None].long(), logits_to_keep=1)
"""
OURS, THEIRS = "`calibrate`", "forward pass of the model in transformers"
BEYOND = ", beyond start-up"
COMPARISONS = (Comparison(OURS, THEIRS), Comparison(OURS + BEYOND, THEIRS + BEYOND))


def once(source: Path, saved: Path, work: Path, windows: int, threads: int) -> dict[str, Cost]:
    """Measure every route once."""
    out, limited = work / "calibrated", {"OMP_NUM_THREADS": str(threads)}

    def ours(model: Path, count: int) -> Cost:
        given = ("--text", ASSET / "eval.txt", "--output", out, "--chunks", count, "--quiet")
        command = [*QWEN35, "calibrate", model, *given, "--threads", threads, "--device", "cpu"]
        return measure(command, out, limited)

    def theirs(model: Path, count: int) -> Cost:
        command = [sys.executable, "-c", WHOLE, model, saved, count, threads]
        return measure(command, None, limited)

    start, theirs_start = ours(ASSET, 1), theirs(ASSET, 1)
    costs = {
        "start-up of `calibrate`": start,
        "start-up of transformers": theirs_start,
        OURS: ours(source, windows),
        THEIRS: theirs(source, windows),
    }
    costs[OURS + BEYOND] = costs[OURS].beyond(start)
    costs[THEIRS + BEYOND] = costs[THEIRS].beyond(theirs_start)
    remove(out)
    return costs


def main() -> None:
    args = arguments(__doc__, windows={"type": int, "default": 4})
    source = made("checkpoint", args.size, args.work)
    saved = made("windows", args.size, args.work)
    title = f"Calibration, {source.name}, {args.windows} windows, {args.threads} threads"
    routes = (source, saved, args.work, args.windows, args.threads)
    report(args, title, lambda: once(*routes), COMPARISONS)


if __name__ == "__main__":
    main()
