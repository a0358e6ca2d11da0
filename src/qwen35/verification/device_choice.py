"""Choose where to ask a model: on the GPU, on the GPU without its vision tower, or on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qwen35.checkpoint.inventory import InventoryItem

__all__ = ["Strategy", "choose", "free_gpu_bytes", "sizes"]

Strategy = Literal["cuda_direct", "cuda_drop", "cpu"]

_SHARE = 0.95
"""Share of the free GPU memory that weights may take; the rest is for activations and the cache."""


def choose(total: int, visual: int, free: int) -> Strategy:
    """Choose by bytes on disk.

    Args:
        total: bytes of all weights.
        visual: bytes of the vision tower.
        free: free bytes on the GPU; 0 without a GPU.
    """
    if total <= _SHARE * free:
        return "cuda_direct"
    if visual and total - visual <= _SHARE * free:
        return "cuda_drop"
    return "cpu"


def sizes(items: Sequence[InventoryItem]) -> tuple[int, int]:
    """Return the bytes on disk of all weights, and of the vision tower."""
    total = sum(item.weight.nbytes for item in items)
    return total, sum(item.weight.nbytes for item in items if item.role.scope == "visual")


def free_gpu_bytes() -> int:
    """Return the free bytes of the first GPU; 0 without one."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0
