"""Measure structural verification of the largest artifacts, on files without data.

    python benchmarks/structure.py [--work DIR] [--runs 3]

Writes the headers, index and config of FP8 and NF4 artifacts of published sizes, and of a dense one
with about 10,000 tensors, as sparse files without weights, and measures `qwen35 verify` on them.
The files take hardly any disk space.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.path[0] != str(ROOT):  # files in this folder would shadow libraries
    sys.path[0] = str(ROOT)

from benchmarks.nf4 import measure, median

from qwen35.checkpoint.header import file_layout
from qwen35.checkpoint.open import describe
from qwen35.checkpoint.source import Checkpoint
from qwen35.model.model_config import parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors
from qwen35.model.sizes import published_config
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe

DEEP = 188
"""Number of layers with which 9B has about 10,000 tensors in NF4."""
CASES = (
    ("Qwen3.5-9B", "nf4"),
    (f"Qwen3.5-9B of {DEEP} layers", "nf4"),
    ("Qwen3.5-35B-A3B", "fp8"),
    ("Qwen3.5-397B-A17B", "fp8"),
)


def describe_deep(folder: Path) -> Checkpoint:
    """Describe a checkpoint of 9B's geometry with more layers, written without its data."""
    raw = published_config("Qwen3.5-9B")
    text = raw["text_config"]
    text["layer_types"] = (text["layer_types"] * DEEP)[:DEEP]
    text["num_hidden_layers"] = DEEP
    config = parse_config(raw)
    specs = list(expected_tensors(config, CheckpointNaming.published(config)))
    head, offsets = file_layout(specs)
    end = max(offsets[spec.name] + spec.nbytes for spec in specs)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    with (folder / "model.safetensors").open("wb") as out:
        out.write(head)
        out.truncate(end)
    return describe(str(folder))


def write_hollow(checkpoint: Checkpoint, recipe: str, folder: Path) -> int:
    """Write an artifact without its data; return its number of tensors."""
    plan = make_plan(checkpoint, load_recipe(recipe))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in plan.files:
        with (folder / file.name).open("wb") as out:
            out.write(file.head)
            out.truncate(file.nbytes)
    for name, content in plan.documents.items():
        (folder / name).write_bytes(content)
    return sum(len(file.offsets) for file in plan.files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    print(f"{'':<36} {'tensors':>8} {'wall s':>7} {'CPU s':>7} {'peak MB':>8}")
    for size, recipe in CASES:
        folder = args.work / "hollow"
        deep = "layers" in size
        source = describe_deep(args.work / "deep") if deep else describe(size)
        tensors = write_hollow(source, recipe, folder)
        command = [sys.executable, "-m", "qwen35.cli.main", "verify", str(folder), "--quiet"]
        cost = median([measure(command, args.work / "nothing") for _ in range(args.runs)])
        print(
            f"{f'{size} {recipe}':<36} {tensors:>8} {cost.wall:>7.2f} {cost.cpu:>7.2f} "
            f"{cost.memory:>8.0f}"
        )
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
