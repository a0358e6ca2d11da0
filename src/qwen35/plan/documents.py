"""Side-car files whose content changes on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qwen35.checkpoint.source import Checkpoint

__all__ = ["Documents", "side_documents"]


@dataclass(frozen=True)
class Documents:
    """New content of side-car files, by name, and notes about it."""

    documents: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def side_documents(checkpoint: Checkpoint, *, text_only: bool) -> Documents:
    """Return the side-car files that are rewritten for this output."""
    del checkpoint, text_only
    return Documents()
