"""Short ways to run a conversion and to look at what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qwen35.checkpoint.source import INDEX_NAME, open_folder
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.sinks.staging import StagedResult
from qwen35.writing.write import write


def plan_of(source: Path, recipe: str = "nf4", *, keep: tuple[str, ...] = ()) -> Plan:
    """Plan a conversion."""
    return make_plan(open_folder(source), load_recipe(recipe).keeping(keep))


def run(source: Path, out: Path, recipe: str = "nf4", **options: Any) -> StagedResult:
    """Convert with one thread."""
    return write(plan_of(source, recipe), out, **{"threads": 1, **options})


def tree(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Load every tensor of a checkpoint with the safetensors library."""
    names = [path.name for path in folder.glob("*.safetensors")]
    if (folder / INDEX_NAME).exists():
        index = json.loads((folder / INDEX_NAME).read_text())
        names = sorted(set(index["weight_map"].values()))
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors |= load_file(folder / name)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """Parse config.json."""
    parsed: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return parsed
