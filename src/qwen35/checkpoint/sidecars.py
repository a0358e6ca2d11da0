"""Sidecars: the files beside the weights, and which outputs receive a copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["LEGAL", "MANIFEST_NAME", "SIDECARS", "Sidecar", "sidecar_names"]

MANIFEST_NAME = "qwen35.json"
"""The manifest: marks a folder as output of this package and records how it was made."""


@dataclass(frozen=True)
class Sidecar:
    """A sidecar and the part of the model that needs it.

    Args:
        name: file name in the checkpoint's folder.
        side: ``text`` files are always copied, ``vision`` files only with the vision tower.
        use: its purpose.
    """

    name: str
    side: Literal["text", "vision"]
    use: str


LEGAL = tuple(f"{name}{end}" for name in ("LICENSE", "NOTICE") for end in ("", ".md", ".txt"))
"""Files of any form that licenses require to travel along (Apache License 2.0, section 4)."""

SIDECARS: tuple[Sidecar, ...] = (
    *(Sidecar(name, "text", "the terms the weights come under") for name in LEGAL),
    Sidecar("added_tokens.json", "text", "older tokenizers: tokens beyond the vocabulary"),
    Sidecar("chat_template.jinja", "text", "chat template"),
    Sidecar("chat_template.json", "text", "chat template of older processors"),
    Sidecar("generation_config.json", "text", "sampling defaults and end tokens"),
    Sidecar("merges.txt", "text", "byte-pair merges of slow tokenizers"),
    Sidecar("preprocessor_config.json", "vision", "image preprocessing"),
    Sidecar("processor_config.json", "vision", "image and video preprocessing, newer form"),
    Sidecar("special_tokens_map.json", "text", "older tokenizers: names of special tokens"),
    Sidecar("tokenizer.json", "text", "tokenizer"),
    Sidecar("tokenizer_config.json", "text", "tokenizer settings"),
    Sidecar("video_preprocessor_config.json", "vision", "video preprocessing"),
    Sidecar("vocab.json", "text", "vocabulary of slow tokenizers"),
)
"""All files that are copied. config.json, the index and qwen35.json are written anew."""


def sidecar_names(*, vision: bool) -> tuple[str, ...]:
    """Return the sidecars to copy to an output with or without the vision tower."""
    return tuple(row.name for row in SIDECARS if vision or row.side == "text")
