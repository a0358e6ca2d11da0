"""Compare verification of numbers with sha256sum of the same files.

    python -m benchmarks.verify [--work DIR] [--size 0.8B|tiny] [--rounds 3]

Makes a random checkpoint with real shapes and its NF4, FP8 and text-only forms, and measures for
each, in turn, `qwen35 verify OUT --source MODEL` (every tensor decoded and compared, every file
hashed) and `sha256sum` of the output's and the source's weights. Start-up is measured on the
embedded checkpoint.
"""

from __future__ import annotations

import shutil
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

RECIPES = ("nf4", "fp8", "text")


def ours(recipe: str) -> str:
    """Return the name of our route."""
    return f"`verify --source`, {recipe}"


def theirs(recipe: str) -> str:
    """Return the name of the other route."""
    return f"`sha256sum` of the same files, {recipe}"


BEYOND = ", beyond start-up"
COMPARISONS = tuple(
    Comparison(ours(recipe) + more, theirs(recipe), ("wall", "cpu"), recipe == "nf4" and not more)
    for recipe in RECIPES
    for more in ("", BEYOND)
)


def convert(source: Path, out: Path, recipe: str) -> None:
    """Write an output; its cost is not measured."""
    flags = ["--skip-verify"] if recipe == "fp8" else []
    measure([*QWEN35, "convert", source, out, "--recipe", recipe, "--quiet", *flags], out)


def verify(output: Path, source: Path) -> Cost:
    """Measure the check of all numbers."""
    return measure([*QWEN35, "verify", output, "--source", source, "--quiet"])


def once(source: Path, work: Path) -> dict[str, Cost]:
    """Measure every route once."""
    costs = {}
    for recipe in RECIPES:
        output = work / f"verify-{recipe}"
        start = verify(work / f"verify-tiny-{recipe}", ASSET)
        costs[f"`verify` of the embedded checkpoint, {recipe}"] = start
        costs[theirs(recipe)] = measure(["sha256sum", *weights(output), *weights(source)])
        costs[ours(recipe)] = verify(output, source)
        costs[ours(recipe) + BEYOND] = costs[ours(recipe)].beyond(start)
    return costs


def main() -> None:
    args = arguments(__doc__)
    source = made("checkpoint", args.size, args.work)
    for recipe in RECIPES:
        convert(ASSET, args.work / f"verify-tiny-{recipe}", recipe)
        convert(source, args.work / f"verify-{recipe}", recipe)
    title = f"Verification, {source.name}"
    report(args, title, lambda: once(source, args.work), COMPARISONS)
    for recipe in RECIPES:
        shutil.rmtree(args.work / f"verify-tiny-{recipe}")
        shutil.rmtree(args.work / f"verify-{recipe}")


if __name__ == "__main__":
    main()
