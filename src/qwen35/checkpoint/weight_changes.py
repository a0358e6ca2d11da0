"""What an adapter does to the values of one weight, computed for any run of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qwen35.codecs.pieces import Readable
from qwen35.tensors import StoredTensor

if TYPE_CHECKING:
    from qwen35.array_types import F32

__all__ = ["LowRank", "Replacement", "WeightChange"]


class WeightChange(Protocol):
    """A change of a weight's values."""

    def apply(self, values: F32, first: int) -> F32:
        """Return the changed values of whole rows.

        Args:
            values: flat; may be changed in place.
            first: index of the first element within the weight.
        """


@dataclass(frozen=True)
class Replacement:
    """Values that an adapter holds whole (``modules_to_save``).

    Args:
        reader: reads the adapter.
        stored: the values.
    """

    reader: Readable
    stored: StoredTensor

    def apply(self, values: F32, first: int) -> F32:
        """Return the adapter's values."""
        return _floats(self.reader, self.stored, first, values.size)


@dataclass(frozen=True)
class LowRank:
    """A product of two matrices, added to a weight of [rows, columns].

    Args:
        reader: reads the adapter.
        left: [rows, rank]; [rank, rows] if `swapped`.
        right: [rank, columns]; [columns, rank] if `swapped`.
        scale: factor of the product.
        swapped: whether both are stored with rows and columns swapped, as for embeddings.
        lengths: DoRA: the Euclidean length of each row afterwards; None to leave them.
    """

    reader: Readable
    left: StoredTensor
    right: StoredTensor
    scale: float
    swapped: bool = False
    lengths: StoredTensor | None = None

    def apply(self, values: F32, first: int) -> F32:
        """Return the values with the product added."""
        import numpy as np

        from qwen35.checkpoint.low_rank import add_product, scale_rows

        right = self._right()
        matrix = values.reshape(-1, right.shape[1])
        row = first // right.shape[1]
        left = self._left(row, len(matrix))
        add_product(matrix, left, right, np.float32(self.scale))
        if self.lengths is not None:
            scale_rows(matrix, _floats(self.reader, self.lengths, row, len(matrix)))
        return values

    def _right(self) -> F32:
        import numpy as np

        shape = self.right.spec.shape
        matrix = _floats(self.reader, self.right, 0, self.right.spec.numel).reshape(shape)
        return np.ascontiguousarray(matrix.T) if self.swapped else matrix

    def _left(self, row: int, count: int) -> F32:
        """Return `count` rows of the left matrix."""
        import numpy as np

        if not self.swapped:
            rank = self.left.spec.shape[1]
            return _floats(self.reader, self.left, row * rank, count * rank).reshape(count, rank)
        rank, rows = self.left.spec.shape
        columns = [_floats(self.reader, self.left, k * rows + row, count) for k in range(rank)]
        return np.ascontiguousarray(np.stack(columns, 1))


def _floats(reader: Readable, stored: StoredTensor, first: int, count: int) -> F32:
    """Read elements of a stored tensor as float32."""
    from qwen35.codecs.floats import empty, f32_from

    spec = stored.spec
    array = empty(spec.dtype, count)
    reader.read_into(stored, first * spec.itemsize, array.data.cast("B"))
    return f32_from(array, spec.dtype)
