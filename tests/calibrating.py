"""A checkpoint to calibrate on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import layout_of, random_tensors, tiny_config, write_checkpoint
from gguf_models import sidecars


def source(folder: Path, *, per_expert: bool = False, **options: Any) -> Path:
    """Write a random checkpoint with a tokenizer, of uneven activations."""
    config = tiny_config(**options)
    tensors = random_tensors(config, layout_of(config, per_expert=per_expert), seed=3)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.view(-1)[::7] += 3
        elif tensor.ndim > 1:
            tensor *= 3
    return write_checkpoint(folder / "in", config, tensors, sidecars=sidecars())
