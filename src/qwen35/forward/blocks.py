"""The parts of a text model in execution order; one is in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen35.checkpoint.inventory import InventoryItem

__all__ = ["HEAD", "MTP", "Block", "blocks", "layer_number"]

HEAD, MTP = "head", "mtp"


@dataclass(frozen=True)
class Block:
    """A decoder layer, the norm before the head, or the multi-token-prediction part.

    Args:
        name: ``layers.3``, ``head``, ``mtp``.
        items: its weights.
    """

    name: str
    items: tuple[InventoryItem, ...]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(item.spec.numel for item in self.items)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(item.weight.nbytes for item in self.items)


def blocks(items: Sequence[InventoryItem]) -> list[Block]:
    """Return the blocks of the text model in execution order."""
    parts: dict[str, list[InventoryItem]] = {}
    for item in items:
        role = item.role
        if role.scope == "text" and role.layer is not None:
            parts.setdefault(f"layers.{role.layer}", []).append(item)
        elif role.scope == "text" and role.name == "norm":
            parts[HEAD] = [item]
        elif role.scope == "mtp":
            parts.setdefault(MTP, []).append(item)
    order = sorted(parts, key=lambda name: (name == MTP, name == HEAD, layer_number(name)))
    return [Block(name, tuple(parts[name])) for name in order]


def layer_number(name: str) -> int:
    """Return the number in ``layers.3``; 0 for other blocks."""
    return int(name.partition(".")[2] or 0)
