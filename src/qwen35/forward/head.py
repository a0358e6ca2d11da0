"""The output head, a piece of its rows in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen35.forward.builder import Builder
from qwen35.forward.side_by_side import MOST, side_by_side

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
        size = self._rows_of(PIECE)
        buffer = self._builder.torch.empty((size, self.hidden), dtype=self._builder.dtype)
        for first in range(0, self.vocabulary, size):
            yield first, self._read(first, buffer)

    def _rows_of(self, numel: int) -> int:
        return min(self.vocabulary, max(1, numel // self.hidden))

    def _read(self, first: int, buffer: Any) -> Any:
        """Return the rows from `first` on for which a buffer [rows, hidden] has room."""
        rows = buffer[: self.vocabulary - first]
        self._builder.weights.fill(self._builder.torch, self.item, rows, first)
        return rows.to(self._builder.device)

    def logits(self, states: Any) -> Any:
        """Return the float32 logits, [n, vocabulary], on the CPU, of normed states [n, hidden]."""
        torch, dtype = self._builder.torch, self._builder.dtype
        out = torch.empty((len(states), self.vocabulary), dtype=torch.float32)
        alone = self._builder.device != "cpu"
        # Parts so small that all threads together hold a piece; the same for any number of them.
        size = self._rows_of(PIECE if alone else PIECE // MOST)

        def multiply(first: int) -> None:
            rows = self._read(first, torch.empty((size, self.hidden), dtype=dtype))
            out[:, first : first + len(rows)] = states @ rows.T

        at_once = 1 if alone else min(MOST, torch.get_num_threads())
        side_by_side(torch, multiply, range(0, self.vocabulary, size), at_once)
        return out
