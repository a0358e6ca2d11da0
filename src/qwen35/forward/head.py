"""The output head, a piece of its rows in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen35.forward.builder import Builder

__all__ = ["PIECE", "Head"]

PIECE = 16 * 2**20
"""Most weights in a piece."""


class Head:
    """The head of a model.

    Args:
        builder: has its weights, and says where to compute.
    """

    def __init__(self, builder: Builder) -> None:
        self._builder, self.item = builder, builder.weights.head
        self.vocabulary, self.hidden = self.item.spec.shape

    def pieces(self) -> Iterator[tuple[int, Any]]:
        """Yield the head as (first row, [rows, hidden]), in order; valid until the next piece.

        Raises:
            TensorError: it cannot be read or decoded.
        """
        torch, builder = self._builder.torch, self._builder
        size = min(self.vocabulary, max(1, PIECE // self.hidden))
        buffer = torch.empty((size, self.hidden), dtype=builder.dtype)
        for first in range(0, self.vocabulary, size):
            rows = buffer[: min(size, self.vocabulary - first)]
            builder.weights.fill(torch, self.item, rows, first)
            yield first, rows.to(builder.device)

    def logits(self, states: Any) -> Any:
        """Return the float32 logits, [n, vocabulary], on the CPU, of normed states [n, hidden]."""
        torch = self._builder.torch
        out = torch.empty((len(states), self.vocabulary), dtype=torch.float32)
        for first, rows in self.pieces():
            out[:, first : first + len(rows)] = states @ rows.T
        return out
