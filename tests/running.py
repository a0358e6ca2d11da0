"""Short ways to run a conversion and to look at what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import Tensors, write_checkpoint
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


def limit_shards(patch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Have plans make shards of at most `nbytes` bytes."""
    patch.setattr("qwen35.planning.safetensors_files.safetensors_options.MAX_SHARD_BYTES", nbytes)


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


def same(one: Tensors, other: Tensors) -> bool:
    """Whether two sets of tensors are the same, byte for byte."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(
            one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)
        )
        for name in one
        if one[name].ndim
    )


def statistics(source: Path, folder: Path, *, name: str = "stats.json", seed: int = 3) -> Path:
    """Write statistics of all packed linear layers, as the collector before us names them."""
    generator = torch.Generator().manual_seed(seed)
    table = {}
    for step in plan_of(source, "fp8").steps:
        if step.op == "fp8" and ".experts." not in step.spec.name and step.role.scope == "text":
            values = torch.rand(step.spec.shape[1], generator=generator).pow(6) * 20
            table[step.spec.name] = {"input_channel_max": values.bfloat16().float().tolist()}
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(table))
    return folder / name


def changed(source: Path, out: Path, changes: Tensors) -> Path:
    """Write a copy of a checkpoint with some tensors replaced."""
    return write_checkpoint(out, read_config(source), {**load_all(source), **changes})


def dequantize(tensors: Tensors, name: str) -> torch.Tensor:
    """Decode an NF4 weight with bitsandbytes."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    parts = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    result: torch.Tensor = dequantize_4bit(tensors[name], state)
    return result
