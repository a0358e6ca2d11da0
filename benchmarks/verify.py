"""Compare verification of numbers with sha256sum of the same files, in one run.

    python benchmarks/verify.py [--work DIR] [--size 0.8B] [--runs 3]

Makes a random checkpoint with real shapes and its NF4, FP8 and text-only forms, and measures for
each `qwen35 verify OUT --source MODEL` (every tensor decoded and compared, every file hashed) and
`sha256sum` of the artifact's and the source's weights. Start-up, measured on the embedded
checkpoint, is subtracted. Only ratios within one run are meaningful.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.path[0] != str(ROOT):  # files in this folder would shadow libraries
    sys.path[0] = str(ROOT)

from benchmarks.nf4 import Cost, make_checkpoint, measure, median

TINY = ROOT / "assets" / "qwen3.5-tiny"
RECIPES = ("nf4", "fp8", "text")
QWEN35 = [sys.executable, "-m", "qwen35.cli.main"]


def convert(source: Path, out: Path, recipe: str) -> Path:
    """Write an artifact; its cost is not measured."""
    flags = ["--recipe", recipe, "--quiet", *(["--skip-verify"] if recipe == "fp8" else [])]
    measure([*QWEN35, "convert", str(source), str(out), *flags], out)
    return out


def verify(artifact: Path, source: Path, runs: int) -> Cost:
    """Measure the check of all numbers."""
    command = [*QWEN35, "verify", str(artifact), "--source", str(source), "--quiet"]
    nothing = artifact.parent / "nothing"
    return median([measure(command, nothing) for _ in range(runs)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--size", default="0.8B")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    source = make_checkpoint(args.size, args.work)
    print(f"\n{source.name}, median of {args.runs} runs; net: less start-up")
    print(f"{'':<28} {'wall s':>7} {'CPU s':>7} {'peak MB':>8} {'net s':>7} {'x sha256sum':>12}")
    for recipe in RECIPES:
        tiny = convert(TINY, args.work / "tiny", recipe)
        start = verify(tiny, TINY, args.runs)
        artifact = convert(source, args.work / recipe, recipe)
        files = [
            str(file) for folder in (artifact, source) for file in folder.glob("*.safetensors")
        ]
        nothing = args.work / "nothing"
        measure(["sha256sum", *files], nothing)  # warms the page cache
        hashed = median([measure(["sha256sum", *files], nothing) for _ in range(args.runs)])
        checked = verify(artifact, source, args.runs)
        for name, cost, net in (
            (f"{recipe}: sha256sum", hashed, hashed.wall),
            (f"{recipe}: qwen35 verify", checked, checked.wall - start.wall),
        ):
            print(
                f"{name:<28} {cost.wall:>7.2f} {cost.cpu:>7.2f} {cost.memory:>8.0f} {net:>7.2f} "
                f"{net / hashed.wall:>12.2f}"
            )
        for folder in (tiny, artifact):
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
