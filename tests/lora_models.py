"""Adapters that are the same on every machine, of any checkpoint, without peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qwen35.checkpoint.inventory import InventoryItem, inventory
from qwen35.checkpoint.source import open_folder

__all__ = ["BASE_ID", "linear", "write_adapter"]

BASE_ID = "owner/Base-1B"
_CARD = f"""---
base_model: {BASE_ID}
library_name: peft
tags:
- base_model:adapter:{BASE_ID}
- lora
---

# An adapter
"""


def linear(item: InventoryItem) -> bool:
    """Whether a weight is a linear layer of the text model."""
    return item.role.scope == "text" and item.role.info.kind == "linear"


def write_adapter(
    base: Path,
    out: Path,
    *,
    chosen: Callable[[InventoryItem], bool] = linear,
    rank: int | Callable[[str], int] = 3,
    inner: str = "model.",
    seed: int = 0,
    spread: float = 2.0**-6,
    **settings: Any,
) -> Path:
    """Write an adapter of the chosen weights, whose values are small whole numbers, scaled.

    Args:
        base: the checkpoint.
        out: folder to write.
        chosen: selects the weights.
        rank: of the matrices, by module.
        inner: what stands before the names of the text model's modules.
        seed: of the values.
        spread: what the whole numbers are multiplied by.
        settings: more keys of adapter_config.json.
    """
    generator = np.random.default_rng(seed)
    items = [item for item in inventory(open_folder(base)) if chosen(item)]
    tensors = {}
    for item in items:
        module = item.module.replace("model.language_model.", "model.").replace("model.", inner, 1)
        rows, columns = item.spec.shape
        size = rank if isinstance(rank, int) else rank(module)
        for name, shape in {"lora_A": (size, columns), "lora_B": (rows, size)}.items():
            whole = generator.integers(-8, 9, shape).astype(np.float32)
            tensors[f"base_model.model.{module}.{name}.weight"] = whole * np.float32(spread)
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors")
    config = {
        "base_model_name_or_path": BASE_ID,
        "lora_alpha": 6,
        "peft_type": "LORA",
        "r": 3,
        "target_modules": sorted({item.module.rpartition(".")[2] for item in items}),
    }
    (out / "adapter_config.json").write_text(json.dumps(config | settings))
    (out / "README.md").write_text(_CARD)
    return out
