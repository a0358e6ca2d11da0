"""Bytes and divergence of every format on the embedded checkpoint: the README's table.

    python -m benchmarks.formats [--chunks 8]

Writes each artifact text-only, measures them all against the checkpoint on its held-out text, and
writes docs/results.json; `python docs/generate.py` builds the table from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import ASSET, ROOT
from qwen35.checkpoint.source import open_folder
from qwen35.evaluation.evaluation_run import evaluate
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write

RESULTS = ROOT / "docs" / "results.json"
PACKED = {"NF4": "text-nf4", "FP8": "text-fp8"}
"""Name of a row to the recipe of `qwen35 convert`."""
SERVED = {
    "FP8 per channel": "fp8-channel",
    "NVFP4": "nvfp4",
    "NVFP4 and FP8": "nvfp4-mixed",
    "INT4": "int4",
    "MLX 4-bit": "mlx-4bit",
    "MLX 8-bit": "mlx-8bit",
}
"""The same; these recipes keep a vision tower, so they start from the text-only version."""
GGUF = {"mix": ("Q8_0", "Q6_K", "Q4_K_M"), "q8-gates-plus": ("Q4_K_M",)}
"""Recipe of `qwen35 gguf` to its file types."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        name: the row's name.
        verb: the verb of qwen35.
        recipe: its recipe.
        path: the output: a folder or a GGUF file.
        files: weight files and their bytes.
    """

    name: str
    verb: str
    recipe: str
    path: Path
    files: dict[str, int]


def packed(folder: Path) -> Iterator[Row]:
    """Write and yield the safetensors artifacts."""
    write(make_plan(open_folder(ASSET), load_recipe("text")), folder / "text")
    sources = dict.fromkeys(PACKED, ASSET) | dict.fromkeys(SERVED, folder / "text")
    for name, recipe in (PACKED | SERVED).items():
        plan = make_plan(open_folder(sources[name]), load_recipe(recipe))
        write(plan, folder / recipe)
        files = {file.name: file.nbytes for file in plan.files}
        yield Row(name, "convert", recipe, folder / recipe, files)


def gguf(folder: Path) -> Iterator[Row]:
    """Write and yield the GGUF files."""
    for recipe, types in GGUF.items():
        plan = make_plan(open_folder(ASSET), load_recipe(recipe, "gguf"), types=types)
        write(plan, folder / recipe)
        for kind, file in zip(types, plan.files, strict=True):
            name = f"GGUF {kind}" + ("" if recipe == "mix" else f", {recipe}")
            path = folder / recipe / file.name
            yield Row(name, "gguf", recipe, path, {file.name: file.nbytes})


def main() -> None:
    """Measure everything and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=8)
    chunks = parser.parse_args().chunks
    text = ASSET / "eval.txt"
    with tempfile.TemporaryDirectory(prefix="qwen35-formats-") as scratch:
        rows = [*packed(Path(scratch)), *gguf(Path(scratch))]
        report = evaluate(ASSET, [row.path for row in rows], text, chunks=chunks)
    simulated = {row.model.name: row.comparison.kld for row in report.simulations}
    base = make_plan(open_folder(ASSET), load_recipe("text"))
    measured: dict[str, Any] = {
        "made_by": "benchmarks/formats.py",
        "tool": dict(report.versions),
        "text": {"name": text.name, "sha256": hashlib.sha256(text.read_bytes()).hexdigest()},
        "tokens": {
            "context": report.chunks.context,
            "chunks": report.chunks.count,
            "scored": report.chunks.count * report.chunks.scored,
        },
        "base": {
            "name": "bf16",
            "recipe": "text",
            "files": {file.name: file.nbytes for file in base.files},
            "bytes": sum(file.nbytes for file in base.files),
            "perplexity": asdict(report.base_perplexity),
        },
        "rows": [
            {
                "name": row.name,
                "verb": row.verb,
                "recipe": row.recipe,
                "source": "text" if row.name in SERVED else "",
                "files": row.files,
                "bytes": sum(row.files.values()),
                "kld": asdict(found.comparison.kld),
                "kld_with_inputs": asdict(kld)
                if (kld := simulated.get(found.model.simulation.name))
                else None,
                "same_top": asdict(found.comparison.same_top),
                "perplexity": asdict(found.comparison.perplexity),
            }
            for row, found in zip(rows, report.candidates, strict=True)
        ],
        "noise_floor": {
            floor.model.engine: asdict(floor.comparison.kld) for floor in report.floors
        },
    }
    RESULTS.write_text(json.dumps(measured, indent=2) + "\n", "utf-8")
    print(f"{RESULTS.relative_to(ROOT)}: {len(rows)} formats, {chunks} chunks")


if __name__ == "__main__":
    main()
