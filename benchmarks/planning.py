"""Measure time and memory of planning the largest checkpoints, on files without data.

    python benchmarks/planning.py [--work DIR] [--runs 3]

Writes the headers, index and config of checkpoints of published sizes as sparse files without
weights, and measures `qwen35 plan` on them, alone and several at once. The last line is the FP8
checkpoint of 397B: 189,042 tensors.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.path[0] != str(ROOT):  # files in this folder would shadow libraries
    sys.path[0] = str(ROOT)

from benchmarks.nf4 import measure, median
from benchmarks.structure import write_hollow

from qwen35.checkpoint.open import describe

CASES = (
    ("Qwen3.5-9B", "bf16", "nf4"),
    ("Qwen3.5-35B-A3B", "fp8", "bf16"),
    ("Qwen3.5-397B-A17B", "bf16", "fp8"),
    ("Qwen3.5-397B-A17B", "fp8", "bf16"),
)
"""Size, storage format, and the recipe to plan."""


def command(folder: Path, recipe: str) -> list[str]:
    plan = [sys.executable, "-m", "qwen35.cli.main", "plan", str(folder)]
    return [*plan, "--recipe", recipe, "--quiet"]


def at_once(folder: Path, recipe: str, count: int) -> float:
    """Run `count` plans at once; return the wall time until the last one ends."""
    began = time.perf_counter()
    processes = [
        subprocess.Popen(command(folder, recipe), stdout=subprocess.DEVNULL) for _ in range(count)
    ]
    if any(process.wait() for process in processes):
        raise SystemExit("failed")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    print(f"{'':<32} {'tensors':>8} {'wall s':>7} {'CPU s':>7} {'peak MB':>8} {'4 at once':>10}")
    for size, stored, recipe in CASES:
        folder = args.work / "hollow"
        tensors = write_hollow(describe(size), "text" if stored == "bf16" else stored, folder)
        cost = median(
            [measure(command(folder, recipe), args.work / "nothing") for _ in range(args.runs)]
        )
        several = at_once(folder, recipe, 4)
        print(
            f"{f'{size} {stored} to {recipe}':<32} {tensors:>8} {cost.wall:>7.2f} "
            f"{cost.cpu:>7.2f} {cost.memory:>8.0f} {several:>10.2f}"
        )
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
