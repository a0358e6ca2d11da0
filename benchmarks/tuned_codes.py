"""Refined codes in tuned files, against hand-made ones with plain codes of the same size.

    python -m benchmarks.tuned_codes [--work DIR] [--model DIR] [--text FILE] [--chunks N]
                                     [--json FILE]

The text has three parts: to calibrate on, to tune on, and to measure on. For the sizes of plain
Q4_K_M and of the recipe q8-gates at Q4_K_M, Q5_K_M and Q6_K, `qwen35 tune` finds a recipe of at
most as many bytes, once with prices of plain codes and once with those of refined ones. All files
are compared with the original as by `benchmarks.codes`, weights alone and with llama.cpp's inputs.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import qwen35
from benchmarks.codes import lines, measured, parser_of, row, run, split
from benchmarks.measuring import environment

CASES = (("mix", "Q4_K_M"), ("q8-gates", "Q4_K_M"), ("q8-gates", "Q5_K_M"), ("q8-gates", "Q6_K"))
HOW = (
    *product(("hand-made", "tuned"), ("plain", "refined")),
    ("tuned for refined", "refined"),
)
"""Recipe and codes; the first is compared with the others."""


def halves(text: Path, work: Path) -> tuple[Path, Path]:
    """Split a text at the end of a line into one to tune on and one to measure on."""
    content = text.read_text("utf-8")
    cut = content.index("\n", len(content) // 2) + 1
    paths = work / "tuning.txt", work / "measuring.txt"
    for path, part in zip(paths, (content[:cut], content[cut:]), strict=True):
        path.write_text(part, "utf-8")
    return paths


def written(model: Path, out: Path, recipe: str, kind: str, calibrated: Path, codes: str) -> Path:
    """Write a file; return its path."""
    hessian = calibrated if codes != "plain" else None
    options: dict[str, Any] = {"imatrix": calibrated, "codes": codes, "hessian": hessian}
    qwen35.gguf(model, out, types=kind, recipe=recipe, **options)
    [path] = out.glob("*.gguf")
    return path


def files_of(model: Path, work: Path, tuning: Path) -> dict[tuple[str, str, str, str], Path]:
    """Write all files, by case and `HOW`."""
    calibrated, files = work / "calibrated", dict[tuple[str, str, str, str], Path]()
    for recipe, kind in CASES:
        name = f"{recipe}-{kind}"
        for way, codes in HOW:
            used, base = recipe, kind
            if way != "hand-made":
                used, base = str(work / f"{name}-{way}.toml"), "Q4_K_M"
            if way != "hand-made" and not Path(used).exists():
                qwen35.tune(
                    model,
                    format="gguf",
                    size=files[recipe, kind, *HOW[0]].stat().st_size,
                    text=tuning,
                    imatrix=calibrated,
                    hessian=None if way == "tuned" else calibrated,
                    output=used,
                    measurements=work / "prices.json",  # the same for all
                )
            out = work / f"{name}-{way}-{codes}"
            files[recipe, kind, way, codes] = written(model, out, used, base, calibrated, codes)
    return files


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, tune, write and measure everything."""
    calibration, rest = split(args.text, args.work)
    tuning, measuring = halves(rest, args.work)
    qwen35.calibrate(
        args.model,
        text=calibration,
        output=args.work / "calibrated",
        hessian=True,
        dtype="float32",
    )
    files = files_of(args.model, args.work, tuning)
    base, series = measured(args.model, list(files.values()), measuring, args.chunks)
    rows = []
    for (recipe, kind), rounded, (way, codes) in product(CASES, (False, True), HOW[1:]):
        first, other = files[recipe, kind, *HOW[0]], files[recipe, kind, way, codes]
        pair = series[str(first), rounded], series[str(other), rounded]
        title = f"{recipe} {kind}, {way}, {codes}{', rounded' if rounded else ''}"
        sizes = {"bytes": [first.stat().st_size, other.stat().st_size]}
        rows.append(row(title, base, pair) | sizes)
    print("\n".join(lines(rows)))
    return {"environment": environment(), "model": args.model.name, "rows": rows}


def main() -> None:
    """Parse the command line and measure."""
    run(parser_of(__doc__, "tuned_codes").parse_args(), benchmark)


if __name__ == "__main__":
    main()
