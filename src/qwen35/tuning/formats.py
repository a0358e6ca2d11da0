"""The formats of recipes that can be tuned; light, since parsers offer them."""

from __future__ import annotations

from qwen35.planning.containers import CONTAINERS
from qwen35.planning.recipe import built_in

__all__ = ["FORMATS"]

FORMATS: tuple[str, ...] = (
    *CONTAINERS["gguf"].formats,
    *(name for name in CONTAINERS["safetensors"].formats if name in built_in("safetensors")),
)
"""Of checkpoints, those that a built-in recipe is named after: it decides what has no unit."""
