"""The tunable recipe formats; cheap to import, because the command line lists them."""

from __future__ import annotations

from typing import Literal, get_args

from qwen35.codecs.registry import CODECS
from qwen35.planning.containers import CONTAINERS
from qwen35.planning.recipe import built_in

__all__ = ["ENGINES", "FORMATS", "Engine"]

FORMATS: tuple[str, ...] = (
    *CONTAINERS["gguf"].formats,
    *(
        name
        for name in CONTAINERS["safetensors"].formats
        if name in built_in("safetensors") and not CODECS[name].dialect
    ),
)
"""Of safetensors, only formats with a built-in recipe of that name: tuning builds on it. Recipes of
dialects mix formats, between which it does not choose."""

Engine = Literal["llama.cpp", "weights"]

ENGINES: tuple[str, ...] = get_args(Engine)
"""Whose rounding of inputs is priced: llama.cpp's on CPUs, or nobody's."""
